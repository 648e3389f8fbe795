"""Shared memory of child processes that are killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.connection import Connection
from pathlib import Path

from actors.shared_memory import removing_shared_memory


def hold_queue(answers: Connection) -> None:
    queue = shared_memory.SharedMemory(create=True, size=4096)
    # The tracker of the tests outlives the child, other than an actor's, and would remove it.
    resource_tracker.unregister(f"/{queue.name}", "shared_memory")
    answers.send(queue.name)
    answers.recv()


def test_what_a_killed_child_had_mapped_is_removed_and_nothing_else() -> None:
    others = shared_memory.SharedMemory(create=True, size=4096)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=hold_queue, args=(theirs,))
    child.start()
    path = Path("/dev/shm") / ours.recv()
    with removing_shared_memory():
        assert path.exists()
        child.kill()
        child.join()
    assert not path.exists()
    assert (Path("/dev/shm") / others.name).exists()
    others.close()
    others.unlink()
