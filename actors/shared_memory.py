"""Shared memory that vLLM's processes leave behind: the queues between an engine and its workers.

Who made them removes them at its end, and so does Python's resource tracker; but an engine process that is killed does
not get there, and the tracker, a child of the actor, is killed with that.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_QUEUES = "/dev/shm/psm_"
"""Python's name for shared memory that nobody named."""


@contextmanager
def removing_shared_memory() -> Iterator[None]:
    """A block that ends the child processes of this one: the queues that they have now are removed behind it."""
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    queues = {path for pid in pids for path in _queues_of(pid)}
    try:
        yield
    finally:
        for path in queues:
            path.unlink(missing_ok=True)


def _queues_of(pid: int) -> set[Path]:
    """Files of queues that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    except OSError:
        return set()  # it has ended meanwhile
    columns = (line.split(maxsplit=5) for line in maps.splitlines())
    return {Path(last[5]) for last in columns if len(last) == 6 and last[5].startswith(_QUEUES)}
