"""The episodes that an engine works on at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """So many; who finds none free waits, in the order of asking."""

    def __init__(self, number: int) -> None:
        self._free = asyncio.Semaphore(number)
        self._waiting = 0
        self._nobody_waits = asyncio.Event()
        self._nobody_waits.set()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold one."""
        self._waiting += 1
        self._nobody_waits.clear()
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._nobody_waits.set()
        try:
            yield
        finally:
            self._free.release()

    async def nobody_waits(self) -> None:
        """Waits until nobody waits for one."""
        await self._nobody_waits.wait()
