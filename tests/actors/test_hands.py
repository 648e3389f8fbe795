"""Who gets the next episodes, and when nobody does. Workers and the pool are stand-ins; no Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from actors.hands import Hands
from actors.slots import Slots

SLOTS, SAMPLES = 4, 2


class Worker:
    """Says that it wants more when the test lets it."""

    def __init__(self) -> None:
        self.has_room, self.is_dead, self.asked = asyncio.Event(), False, 0
        self.wants_more = SimpleNamespace(remote=self._wants_more)

    async def _wants_more(self) -> None:
        self.asked += 1
        await self.has_room.wait()
        self.has_room.clear()
        if self.is_dead:
            raise RayActorError()


class Pool:
    """Of so many workers, all of them there."""

    def __init__(self, workers: int) -> None:
        self.workers = [Worker() for _ in range(workers)]
        self.away: list[Worker] = []
        self.idle: list[Worker] = []

    def employs(self, worker: Worker) -> bool:
        return worker not in self.away

    def lost(self, worker: Worker, cause: str) -> None:
        self.away.append(worker)


@asynccontextmanager
async def hands_of(pool: Pool) -> AsyncIterator[Hands]:
    async with asyncio.TaskGroup() as tasks:
        asking = list[asyncio.Task[None]]()
        hands = Hands(
            SLOTS,
            pool.employs,
            pool.idle.append,
            pool.lost,
            lambda work: asking.append(tasks.create_task(work)),
        )
        for worker in pool.workers:
            hands.hire(worker)
        yield hands
        for task in asking:
            task.cancel()


async def given_away(hands: Hands, pool: Pool, tasks: int) -> list[int]:
    """The number of the worker that got each."""
    got = []
    for _ in range(tasks):
        hand = await asyncio.wait_for(hands.take(SAMPLES), 10)
        hands.sent(hand)
        got.append(pool.workers.index(hand.worker))
    return got


async def is_refused(hands: Hands) -> bool:
    asking = asyncio.create_task(hands.take(SAMPLES))
    for _ in range(20):
        await asyncio.sleep(0)
    if not asking.done():
        asking.cancel()
        return True
    hands.sent(asking.result())
    return False


def test_whoever_has_the_fewest_in_hand_gets_the_next() -> None:
    async def run() -> None:
        async with hands_of(pool := Pool(3)) as hands:
            assert sorted(await given_away(hands, pool, 3)) == [0, 1, 2]
            assert sorted(await given_away(hands, pool, 3)) == [0, 1, 2]
            assert not any(worker.asked for worker in pool.workers)

    asyncio.run(run())


def test_beyond_its_slots_a_worker_gets_more_each_time_that_it_says_so() -> None:
    """Of four slots two are free when the fast ones of four are done, and nobody but the worker knows."""

    async def run() -> None:
        async with hands_of(pool := Pool(1)) as hands:
            # Two more than it has slots wait with it, so that none stays empty until the next request is there.
            assert await given_away(hands, pool, 3) == [0, 0, 0]
            assert await is_refused(hands)
            pool.workers[0].has_room.set()
            assert await given_away(hands, pool, 1) == [0]
            assert await is_refused(hands)
            assert pool.workers[0].asked == 2

    asyncio.run(run())


def test_a_worker_that_always_wants_more_has_no_end_of_episodes_in_hand_nevertheless() -> None:
    """They might all wait to be weighed."""

    async def run() -> None:
        async with hands_of(pool := Pool(1)) as hands:
            tasks = 0
            while not await is_refused(hands):
                tasks += 1
                pool.workers[0].has_room.set()
            assert SLOTS < 2 * tasks <= 4 * SLOTS

    asyncio.run(run())


def test_a_worker_that_is_found_dead_when_it_is_asked_gets_no_more() -> None:
    async def run() -> None:
        async with hands_of(pool := Pool(2)) as hands:
            await given_away(hands, pool, 6)
            pool.workers[1].is_dead = True
            for worker in pool.workers:
                worker.has_room.set()
            assert await given_away(hands, pool, 1) == [0]
            assert pool.away == [pool.workers[1]]

    asyncio.run(run())


def test_who_has_put_down_all_is_let_go() -> None:
    async def run() -> None:
        async with hands_of(pool := Pool(1)) as hands:
            first, second = await hands.take(3), await hands.take(1)
            hands.put_down(first, 3)
            assert hands.holds(pool.workers[0]) and not pool.idle
            hands.put_down(second, 1)
            assert not hands.holds(pool.workers[0])
            assert pool.idle == pool.workers

    asyncio.run(run())


@pytest.mark.parametrize("number", [1, 3])
def test_whoever_asks_whether_somebody_waits_for_a_slot_is_answered_when_nobody_does(number: int) -> None:
    async def run() -> None:
        slots, ends = Slots(number), [asyncio.Event() for _ in range(number + 1)]

        async def hold(end: asyncio.Event) -> None:
            async with slots.one():
                await end.wait()

        await slots.nobody_waits()
        async with asyncio.TaskGroup() as tasks:
            for end in ends:
                tasks.create_task(hold(end))
            await asyncio.sleep(0)
            asking = tasks.create_task(slots.nobody_waits())
            await asyncio.sleep(0)
            assert not asking.done()
            ends[0].set()
            await asyncio.wait_for(asking, 10)
            for end in ends:
                end.set()

    asyncio.run(run())
