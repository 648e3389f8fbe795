"""What of a run directory is complete: the files that belong into a copy of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.run import ACTOR_LOGS, MIRROR_FILE
from retriever_service.files import json_object

_LEFT_OUT = ("lock", MIRROR_FILE, "tensorboard", ACTOR_LOGS)
"""At the top. TensorBoard's events are made anew from the metrics at every start; logs of actors are of use where they
are."""
_RUNNING = ("progress.json", "run.log", "metrics.jsonl")
"""They change all the time: no reason by themselves to copy at once."""
_TOLD = (".json", ".jsonl", ".log", ".yaml", "")
"""Markers and logs, by the ending of their names. They are replaced or grow, and are small."""


State = tuple[int, int, int]
"""Inode, time of the last change in nanoseconds, size: a file of which they are the same is the same."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file as it was when the directory was looked through."""

    path: Path
    state: State
    content: bytes | None
    """Of a marker or log whose state is not known."""

    @property
    def is_running(self) -> bool:
        return self.path.name in _RUNNING


def complete_files(run: Path, known: Mapping[str, State]) -> dict[str, Found]:
    """By their path from the run directory.

    Markers are looked at first, so whatever a marker that was seen speaks of is there.

    Args:
        known: states of files whose contents need not be read.

    Raises:
        OSError: the directory cannot be read, or something went while it was looked through.
    """
    markers, checkpoints = {}, {}
    for path in _walk(run):
        name = path.relative_to(run).as_posix()
        if not _is_told(name):
            continue
        state = state_of(path)
        is_checkpoint = name.endswith("learner/checkpoint.json")
        content = path.read_bytes() if is_checkpoint or known.get(name) != state else None
        markers[name] = Found(path, state, content)
        if is_checkpoint:
            # Of a marker that is damaged nothing is copied: what it spoke of is not known.
            with suppress(ValueError, KeyError):
                checkpoints[str(Path(name).parent)] = str(json_object(content or b"")["slot"])
    others = {
        name: Found(path, state_of(path), None)
        for path in _walk(run)
        if not _is_told(name := path.relative_to(run).as_posix()) and _is_whole(name, checkpoints)
    }
    return {**others, **markers}


def checkpoint_of(name: str) -> str | None:
    """The learner's checkpoint that a file is part of, or marks; None of any other file."""
    folders = [str(folder) for folder in Path(name).parents if folder.name == "learner"]
    return folders[0] if folders else None


def _is_told(name: str) -> bool:
    """Markers and logs; a model and an index are there as a whole or not at all, with all of their files."""
    path = Path(name)
    return path.suffix in _TOLD and not {"model", "index"} & set(path.parts)


def _is_whole(name: str, checkpoints: dict[str, str]) -> bool:
    """Of a learner's checkpoints only the slot that its marker named."""
    slot = Path(name).parent
    return slot.parent.name != "learner" or checkpoints.get(str(slot.parent)) == slot.name


def _walk(run: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(run):
        is_top = Path(folder) == run
        left_out = _LEFT_OUT if is_top else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp") and name not in left_out:
                yield Path(folder) / name


def state_of(path: Path) -> State:
    """As `Found.state`."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
