"""Ctrl-C and SIGTERM end a command in order; a second one ends it at once.

The first raises `KeyboardInterrupt`, which asyncio and the libraries let pass, in the main thread, so that every `with`
block on the way out closes what it holds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """The command was told to stop. `exit_code` is the one that shells know: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that SIGINT and SIGTERM end with `Interrupted`. In another thread than the main one, which alone gets
    signals, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    outer = before[signal.SIGTERM]
    handler = outer if isinstance(outer, _Handler) else _Handler()
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        # Which signal it was is not in the exception: Ray's `get` raises one of its own in place of ours.
        raise Interrupted(handler.first or signal.SIGINT) from error
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def received() -> Interrupted:
    """What a block of `interruptible` was told, for where it can end with the process alone."""
    handler = signal.getsignal(signal.SIGTERM)
    first = handler.first if isinstance(handler, _Handler) else None
    return Interrupted(first or signal.SIGINT)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, which a signal ends by cancelling `main`.

    An exception in whatever callback the signal met would end the loop with all tasks in the middle of something.

    Raises:
        KeyboardInterrupt: a signal came.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, _Handler) or threading.current_thread() is not threading.main_thread():
        return asyncio.run(main)

    before = handler.first

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        handler.cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        if handler.first is not before:
            task.cancel()
        try:
            return await main
        finally:
            handler.cancel = _nothing

    # Nor is the making of a loop to be broken into, or its end.
    handler.cancel = _nothing
    try:
        result = asyncio.run(cancellable())
    except asyncio.CancelledError:
        if handler.first is before:
            raise
        raise KeyboardInterrupt from None
    finally:
        handler.cancel = None
    if handler.first is not before:
        raise KeyboardInterrupt
    return result


def _nothing() -> None:
    """The signal is noted, and looked at later."""


class _Handler:
    first: int | None = None
    cancel: Callable[[], object] | None = None
    """What to do at the first signal instead of raising an exception."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = number
            if self.cancel is None:
                raise KeyboardInterrupt
            self.cancel()
            return
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), _SHOW_CURSOR)  # a progress bar had hidden it
        os._exit(128 + number)
