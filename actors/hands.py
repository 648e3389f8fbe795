"""Who gets the next task of the phases at work: of the workers that have room the one with the fewest in hand.

A task is in hand until the longest of its episodes is done and in the sink, and most of them are done long before. So
what is in hand says how few slots of an engine can be free, not how many are. Beyond as many episodes as it has slots a
worker itself says when none of its episodes waits for one. Then it gets one task more, so that no slot stays empty
until the next is there.

Where the sink is slow, tasks that wait for it are in hand too: of a worker at most `MOST_TIMES_SLOTS` times as many
episodes as slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from actors.deaths import DEATHS, in_words

MOST_TIMES_SLOTS = 4
"""Enough for all slots to be in use where the longest episode of a task takes so many times as long as the mean."""


class Hand:
    """A worker, and how many episodes it has in hand."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.episodes = 0
        self.is_full = False
        """It got more than it has slots, and has not said since that none of it waits."""
        self.is_asked = asyncio.Event()


class Hands:
    """The workers of a pool while it is at work.

    Args:
        slots: of each worker's engine.
        employs: whether a worker may be given work.
        let_go: told of a worker that has nothing in hand any more.
        lose: ends a worker, for this reason.
        spawn: has something go on as long as the pool is at work.
    """

    def __init__(
        self,
        slots: int,
        employs: Callable[[Any], bool],
        let_go: Callable[[Any], None],
        lose: Callable[[Any, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._slots = slots
        self._employs, self._let_go, self._lose, self._spawn = employs, let_go, lose, spawn
        self._hands: list[Hand] = []
        self._news = asyncio.Event()

    def hire(self, worker: Any) -> None:
        """It is there, and gets work from now on."""
        hand = Hand(worker)
        self._hands.append(hand)
        self._spawn(self._ask(hand))
        self._news.set()

    def holds(self, worker: Any) -> bool:
        """Whether it has something in hand."""
        return any(hand.worker is worker and hand.episodes for hand in self._hands)

    async def take(self, episodes: int) -> Hand:
        """Who is to do a task of so many. Waits until somebody has room."""
        while (hand := self._with_room(episodes)) is None:
            self._news.clear()
            await self._news.wait()
        hand.episodes += episodes
        hand.is_full = hand.episodes > self._slots
        return hand

    def sent(self, hand: Hand) -> None:
        """The task that it took is on the way: from now on it counts when the worker is asked."""
        if hand.is_full:
            hand.is_asked.set()

    def put_down(self, hand: Hand, episodes: int) -> None:
        """A task is in the sink, or lost, or given up."""
        hand.episodes -= episodes
        self._news.set()
        if not hand.episodes:
            if not self._employs(hand.worker):
                self._hands = [other for other in self._hands if other is not hand]
            self._let_go(hand.worker)

    def _with_room(self, episodes: int) -> Hand | None:
        most = max(MOST_TIMES_SLOTS * self._slots, self._slots + episodes)
        for hand in sorted(self._hands, key=lambda it: it.episodes):
            room = (self._slots if hand.is_full else most) - hand.episodes
            if episodes <= room and self._employs(hand.worker):
                return hand
        return None

    async def _ask(self, hand: Hand) -> None:
        """Each time that it got more than it has slots it says when it has room again."""
        while True:
            await hand.is_asked.wait()
            hand.is_asked.clear()
            try:
                await hand.worker.wants_more.remote()
            except DEATHS as error:
                self._lose(hand.worker, in_words(error))
                return
            hand.is_full = False
            self._news.set()
