"""The plugin ends orphaned processes; plain child processes stand in for vLLM's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from actors import vllm_plugin


def child(pids: Connection) -> None:
    vllm_plugin.end_with_parent()
    vllm_plugin.end_with_parent()
    pids.send(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def parent(pids: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=child, args=(pids,)).start()
    time.sleep(60)


def state(pid: int) -> str:
    """As /proc has it: T is stopped; Z, and nothing, is ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_even_a_stopped_process_ends_when_its_parent_was_killed() -> None:
    context = multiprocessing.get_context("spawn")
    pids, sending = context.Pipe(duplex=False)
    process = context.Process(target=parent, args=(sending,))
    process.start()
    assert pids.poll(120), "the child did not come up"
    pid = pids.recv()
    wait_for(lambda: state(pid) == "T")
    assert process.pid is not None
    assert os.getpgid(pid) != os.getpgid(process.pid), "a Ctrl-C in the terminal is for the parent alone"
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    wait_for(lambda: state(pid) in ("", "Z"))


def test_process_that_owns_the_engine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("it would be killed with its parent")

    monkeypatch.setattr(vllm_plugin.ctypes, "CDLL", load)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    vllm_plugin.end_with_parent()
