"""The plugin ends orphaned processes; plain child processes stand in for vLLM's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from actors import vllm_plugin


def child(pids: Connection) -> None:
    vllm_plugin.end_with_parent()
    vllm_plugin.end_with_parent()
    pids.send(os.getpid())
    time.sleep(60)


def parent(pids: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=child, args=(pids,)).start()
    time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_process_ends_when_its_parent_was_killed() -> None:
    context = multiprocessing.get_context("spawn")
    pids, sending = context.Pipe(duplex=False)
    process = context.Process(target=parent, args=(sending,))
    process.start()
    assert pids.poll(120), "the child did not come up"
    pid = pids.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_process_that_owns_the_engine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    vllm_plugin.end_with_parent()
    assert "end-with-parent" not in {thread.name for thread in vllm_plugin.threading.enumerate()}
