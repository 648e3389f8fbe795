"""A rank's part in writing checkpoints while training goes on, and in finding out whether they are whole.

    begin     every rank copies its share to the host's memory; all go on training, and a thread of each writes the copy
    settle    between two steps: once all ranks have written theirs, rank 0 writes the marker that makes it a checkpoint
    finish    the same, after a wait for those that have not

Until the marker is there the checkpoint before is the one that counts, whatever dies. The next `begin` waits for the
one before. Every method is collective: all ranks call it, with the same arguments.
"""

from __future__ import annotations

import io
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors import learner_files, learner_state
from actors.collectives import gathered, is_so_anywhere, on_rank_zero
from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError
from retriever_service.files import FileRecord, check_contents, records_as_json, records_from_json
from retriever_service.machine import available_memory

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Of the host's free memory the copies of all ranks of a machine may take so much; what needs more is written at once,
a bucket after the other, while training waits."""

Records = dict[str, FileRecord]


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written."""

    directory: Path
    slot: str
    facts: Mapping[str, Any]
    keeps_before: bool
    files: Future[Records]  # of this rank


class Checkpointer:
    """Of one rank."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None

    def begin(
        self,
        directory: Path,
        engine: Any,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        keeps_before: bool,
    ) -> None:
        """Take what the engine holds now for a checkpoint in `directory`, which replaces the one that is there.

        Args:
            state: what else this rank needs to go on.
            facts: what to say of the checkpoint without opening it.
            keeps_before: the one that it replaces stays, for the case that this one is damaged, until the next begins.

        Raises:
            UserError: the one before could not be written, or this one, where training had to wait for it.
        """
        self.finish()
        slot = on_rank_zero(lambda: learner_files.free_slot(directory))
        serialised = io.BytesIO()
        torch.save(dict(state), serialised)
        buckets = learner_state.buckets(engine)
        if self._has_room_for(learner_state.share_bytes(engine)):
            copies = _emptied(list(buckets))
            files = self._thread.submit(_write, directory / slot, copies, serialised.getvalue())
        else:
            files = _done(lambda: _write(directory / slot, buckets, serialised.getvalue()))
        self._writing = _Writing(directory, slot, facts, keeps_before, files)

    def settle(self) -> None:
        """Make a checkpoint of what is being written, if all ranks have written theirs. Waits for none.

        Raises:
            UserError: a rank could not write.
        """
        if self._writing is None:
            return
        files = self._writing.files
        failed = files.done() and files.exception() is not None
        is_open, has_failed = is_so_anywhere(not files.done(), failed)
        if has_failed or not is_open:
            self.finish()

    def finish(self) -> None:
        """Wait until what is being written is a checkpoint. Nothing happens where nothing is.

        Raises:
            UserError: a rank could not write. The checkpoint before is still there.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        mine: Records | OSError
        try:
            mine = writing.files.result()
        except OSError as error:
            mine = error
        records: Records = {}
        for share in gathered(mine):
            if isinstance(share, OSError):
                raise UserError(_could_not_write(writing, share)) from share
            records |= share
        try:
            on_rank_zero(
                lambda: learner_files.commit_slot(
                    writing.directory,
                    writing.slot,
                    {**writing.facts, "files": records_as_json(records)},
                    keeps_before=writing.keeps_before,
                )
            )
        except (OSError, RetrieverError) as error:
            raise UserError(_could_not_write(writing, error)) from error

    def whole(self, directory: Path, phase: str | None = None) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint in `directory` whose files are all as they were written.

        Args:
            phase: of this phase of training; None: of any.

        Returns:
            its slot and its facts, None if there is none; and what is wrong with those that were passed over.

        Raises:
            UserError: there is no checkpoint, or an earlier version wrote it.
        """
        self.finish()
        problems: list[str] = []
        for candidate in on_rank_zero(lambda: learner_files.candidates(directory)):
            if phase is not None and candidate["phase"] != phase:
                continue
            found = [problem for problem in gathered(_look_at(directory, candidate)) if problem is not None]
            if not found:
                return candidate, problems
            problems.append(f"the checkpoint of step {candidate['step']} is damaged: {found[0]}")
        return None, problems

    def close(self) -> None:
        """Finish, and end the thread."""
        self.finish()
        self._thread.shutdown()

    def _has_room_for(self, size: int) -> bool:
        """Whether the host's memory takes the copies of all ranks on this machine."""
        host, everyone = socket.gethostname(), gathered((socket.gethostname(), size))
        here = sum(share for name, share in everyone if name == host)
        if here <= (room := int(MEMORY_SHARE * available_memory())):
            return True
        logger.warning(
            f"a copy of the optimiser's state takes {here / 1e9:.1f} GB of this machine's memory, of which "
            f"{room / 1e9:.1f} GB may be taken: training waits until the checkpoint is written"
        )
        return False


def _write(slot: Path, buckets: Iterable[learner_state.Bucket], state: bytes) -> Records:
    """This rank's files, on the disk when it returns. No collective.

    Raises:
        OSError: the disk is full, or what else keeps a file from being written.
    """
    learner_files.clear(slot, dist.get_rank(), dist.get_world_size())
    paths = learner_state.write(buckets, slot)
    own = slot / f"rank_{dist.get_rank()}.pt"
    own.write_bytes(state)
    return learner_files.recorded([*paths, own])


def _emptied(buckets: list[learner_state.Bucket]) -> Iterable[learner_state.Bucket]:
    """Each bucket is let go when the next one is asked for."""
    while buckets:
        yield buckets.pop(0)


def _done(work: Callable[[], Records]) -> Future[Records]:
    done: Future[Records] = Future()
    try:
        done.set_result(work())
    except OSError as error:
        done.set_exception(error)
    return done


def _look_at(directory: Path, candidate: Mapping[str, Any]) -> str | None:
    """What is wrong with the files that this rank reads through; the ranks share them."""
    records = records_from_json(candidate["files"])
    for name in sorted(records)[dist.get_rank() :: dist.get_world_size()]:
        try:
            check_contents(directory / candidate["slot"] / name, records[name], "it is not used")
        except (OSError, RetrieverError) as error:
            return str(error)
    return None


def _could_not_write(writing: _Writing, error: Exception) -> str:
    before = learner_files.facts_of(writing.directory)
    kept = f"that of step {before['step']} is still there" if before else "there is none before it"
    return (
        f"{writing.directory}: the checkpoint of optimiser step {writing.facts['step']} could not be written "
        f"({error}); {kept}. Make room, or mend what else keeps files from being written, and run the same "
        "command again"
    )
