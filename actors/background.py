"""Coroutines that go on in a thread of their own while the caller does something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ongoing(Generic[T]):
    """Something that goes on; `Background.begin` gives it."""

    def __init__(self, main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: Future[T] = Future()
        loop.call_soon_threadsafe(self._start, main)

    def _start(self, main: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(main)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._future.set_exception(CancelledError())
        elif (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())

    @property
    def is_over(self) -> bool:
        """Whether it has ended, however it did."""
        return self._future.done()

    def result(self) -> T:
        """What came of it. Waits; an interrupt ends it.

        Raises:
            KeyboardInterrupt: a signal came meanwhile, and it has ended.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what it raised.
        """
        try:
            return self._future.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End it, and wait until it has put away what it holds. Nothing if it has ended already."""
        if not self.is_over:
            self._loop.call_soon_threadsafe(lambda: self._task.cancel())
            wait([self._future])


class Background:
    """An event loop in a thread, which starts with the first that is to go on there. Close it in the end."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ongoing: list[Ongoing[Any]] = []

    def begin(self, main: Coroutine[Any, Any, T]) -> Ongoing[T]:
        """`main` from now on."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="background", daemon=True)
            self._thread.start()
        ongoing = Ongoing(main, self._loop)
        self._ongoing = [*(it for it in self._ongoing if not it.is_over), ongoing]
        return ongoing

    def close(self) -> None:
        """End what still goes on, and the thread."""
        for ongoing in self._ongoing:
            ongoing.cancel()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None
