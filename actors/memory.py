"""How much of what is sampled may wait to be weighed."""

from __future__ import annotations

import asyncio

BYTES_PER_TOKEN = 16
"""Of an episode, about: the token's id, log-probability and mask, and the text of passages in four bytes a token."""


class Memory:
    """Room for episodes from when they are asked for until they are weighed.

    None is taken to be smaller than the largest one so far, or than one of a full context. So however many of those in
    hand have to wait, they take no more than `limit` bytes together; only one task alone may.

    Args:
        limit: bytes.
        longest: tokens of a full context.
    """

    def __init__(self, limit: float, longest: int) -> None:
        self.limit, self._largest = limit, float(BYTES_PER_TOKEN * longest)
        self._episodes = 0
        self._news = asyncio.Event()

    async def reserve(self, episodes: int) -> None:
        """Waits until there is room for so many more."""
        while self._episodes and (self._episodes + episodes) * self._largest > self.limit:
            self._news.clear()
            await self._news.wait()
        self._episodes += episodes

    def learn(self, episodes: int, size: int) -> None:
        """So many take so many bytes together."""
        self._largest = max(self._largest, size / episodes)

    def release(self, episodes: int) -> None:
        """They are weighed, or lost."""
        self._episodes -= episodes
        self._news.set()
