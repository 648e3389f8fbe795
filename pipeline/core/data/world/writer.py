"""Writes a generated world to a directory, as a stream: memory does not grow with the number of passages.

Guarantees:
- The same arguments give byte-identical files.
- The files are written in a temporary directory beside `out`, which takes its place only when it is complete.
- A non-empty directory is left alone: the identical complete world is a no-op, anything else a `UserError`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.data.split_names import SPLITS
from pipeline.core.data.world.passages import generate_passages, passage_of
from pipeline.core.data.world.questions import generate_questions
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.errors import UserError
from retriever_service.files import json_object

__all__ = [
    "GENERATOR_VERSION",
    "WorldSpec",
    "WorldSummary",
    "generate_passages",
    "generate_questions",
    "passage_of",
    "write_world",
]

GENERATOR_VERSION = 1
"""Raised whenever the same spec would give other files than before."""

_MANIFEST = "world.json"
_PROGRESS_EVERY = 1_000


@dataclass(frozen=True, slots=True)
class WorldSummary:
    """What a world directory holds; `world.json` has the same fields."""

    seed: int
    size: str
    partition: str
    num_passages: int
    num_train: int
    num_dev: int
    num_test: int
    generator_version: int = GENERATOR_VERSION


def write_world(
    out: Path,
    *,
    seed: int,
    size: Literal["small", "medium", "large"],
    partition: str = "default",
    on_progress: Callable[[int, int], None] | None = None,
) -> WorldSummary:
    """Write corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl and world.json into `out`.

    Args:
        on_progress: called with (records written, records in all) every thousand records and at the end.

    Raises:
        UserError: `out` holds anything but the identical world, or size or partition is unknown.
    """
    spec = WorldSpec.of_size(seed, size, partition)
    summary = WorldSummary(
        seed, size, partition, spec.num_passages, spec.num_train, spec.num_dev, spec.num_test
    )
    out = out.absolute()
    if _is_complete(out, summary):
        return summary
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        progress = _Progress(spec.num_passages + sum(map(spec.num_questions, SPLITS)), on_progress)
        _write_lines(partial / "corpus.jsonl", progress.count(generate_passages(spec)))
        for split in SPLITS:
            _write_lines(partial / f"{split}.jsonl", progress.count(generate_questions(spec, split)))
        _write(partial / _MANIFEST, [json.dumps(asdict(summary), indent=2), "\n"])
        partial.chmod(0o755)  # mkdtemp makes directories that only the owner can read
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    progress.report()
    return summary


def _is_complete(out: Path, summary: WorldSummary) -> bool:
    """True if `out` holds exactly this world, False if it is absent or empty; else raises UserError."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is not a directory; give the path of a new or empty directory")
    if not any(out.iterdir()):
        return False
    manifest = out / _MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{out} is not empty and holds no {_MANIFEST}; choose an empty directory or empty this one"
        )
    try:
        found = json_object(manifest.read_bytes())
    except ValueError as error:
        raise UserError(f"{manifest} is damaged ({error!s:.200}); choose an empty directory") from error
    if found != asdict(summary):
        raise UserError(
            f"{out} holds another world (seed {found.get('seed')!s:.50}, size {found.get('size')!s:.50}); choose an "
            f"empty directory for seed {summary.seed}, size {summary.size}"
        )
    return True


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write(path, (json.dumps(record) + "\n" for record in records))


def _write(path: Path, chunks: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


class _Progress:
    """Counts records that pass through and reports them."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def count(self, records: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for record in records:
            yield record
            self._done += 1
            if self._done % _PROGRESS_EVERY == 0:
                self.report()

    def report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
