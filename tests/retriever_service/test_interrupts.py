"""Signals of real processes: the way out is orderly the first time, and immediate the second."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from retriever_service.interrupts import Interrupted, interruptible
from tests.retriever_service.support import ROOT

PROGRAM = """
import sys, time
from retriever_service.interrupts import Interrupted, interruptible

try:
    with interruptible():
        try:
            {work}
        finally:
            print("closing", flush=True)
            {closing}
            print("closed", flush=True)
except Interrupted as interrupt:
    print(interrupt.name, flush=True)
    sys.exit(interrupt.exit_code)
"""
BLOCKED = """
            print("up", flush=True)
            time.sleep(60)
"""
WAITING_TASK = """
            import asyncio
            from retriever_service import interrupts

            async def wait():
                print("up", flush=True)
                await asyncio.sleep(60)

            interrupts.run(wait())
"""
BUSY_TASKS = """
            import asyncio
            from retriever_service import interrupts

            async def work():
                print("up", flush=True)
                while True:
                    time.sleep(0.01)
                    await asyncio.sleep(0)

            async def both():
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(work())
                    tasks.create_task(asyncio.sleep(60))

            interrupts.run(both())
"""
"""The signal meets a task in the middle of something."""


def start(work: str = BLOCKED, closing: str = "pass") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=work, closing=closing)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(
    "work", [BLOCKED, WAITING_TASK, BUSY_TASKS], ids=["blocked", "in an event loop", "in a busy one"]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_blocks_close(work: str, number: signal.Signals, code: int) -> None:
    process = start(work)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert said.split() == ["closing", "closed", number.name]
    assert errors == ""
    assert process.returncode == code


def test_the_second_signal_ends_at_once() -> None:
    process = start(closing="time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert said == ""
    assert process.returncode == 130


def test_which_signal_it_was_is_known_although_a_library_raises_anew() -> None:
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Interrupted) as caught, interruptible():
        library()
    assert (caught.value.name, caught.value.exit_code) == ("SIGTERM", 143)


def test_a_block_within_another_is_told_too_and_what_was_before_comes_back() -> None:
    def inner() -> None:
        with interruptible():
            signal.raise_signal(signal.SIGTERM)

    def outer() -> None:
        with interruptible():
            with pytest.raises(Interrupted, match="15"):
                inner()
            raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="15"):
        outer()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_is_left_alone() -> None:
    done = []

    def work() -> None:
        with interruptible():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
