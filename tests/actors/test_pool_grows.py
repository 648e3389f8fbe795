"""Workers that join a pool later, that leave it with their nodes, and that were never there."""

from __future__ import annotations

import asyncio

import pytest

from actors.session import ClusterError
from pipeline.core.policies import Snapshot
from tests.actors.pools import (
    ENGINE_ERROR,
    NEVER,
    Nodes,
    Worker,
    pool_of,
    present,
    started,
    until_present,
    without_ray,
)

FULL = 10_000
"""Episodes of a task with which the hands of any of these workers are full."""


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return without_ray(monkeypatch)


def test_a_pool_grows_as_there_is_room_and_no_further() -> None:
    first, soon, never = Worker(), Worker(room=0.1), Worker(room=NEVER)
    pool = started(first, soon, never, max_workers=3)

    async def work() -> None:
        async with pool.at_work():
            hands = [await pool.hands.take(FULL) for _ in range(2)]
            assert [hand.worker for hand in hands] == [first, soon]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.hands.take(FULL), 0.1)

    asyncio.run(work())
    assert present(pool) == [first, soon]
    assert (soon.version, soon.loaded) == (7, "model-7")


def test_a_worker_without_room_is_asked_for_once_and_serves_the_version_of_the_day_that_it_comes() -> None:
    first, late = Worker(), Worker(room=0.2)
    pool = started(first, late, max_workers=2)

    async def work(seconds: float) -> None:
        async with pool.at_work():
            await asyncio.sleep(seconds)

    asyncio.run(work(0.05))
    assert not late.killed
    pool.now_serves(Snapshot(8, "model-8"))
    asyncio.run(work(0.5))
    assert present(pool) == [first, late]
    assert (late.version, late.loaded) == (8, "model-8")


def test_an_engine_that_began_to_start_with_an_earlier_version_loads_the_current_one() -> None:
    first, slow = Worker(), Worker(start=0.2)
    pool = started(first, slow, max_workers=2)

    async def work(seconds: float) -> None:
        async with pool.at_work():
            await asyncio.sleep(seconds)

    asyncio.run(work(0.05))
    pool.now_serves(Snapshot(8, "model-8"))
    assert present(pool) == [first]
    asyncio.run(work(0.5))
    assert present(pool) == [first, slow]
    assert (slow.version, slow.loaded) == (8, "model-8")


@pytest.mark.parametrize("in_hand", [0, 2])
def test_a_worker_on_a_node_that_is_to_leave_ends_when_it_has_nothing_in_hand(
    nodes: Nodes, in_hand: int
) -> None:
    leaving, other = Worker(node="going"), Worker()
    nodes.alive.add("going")
    pool = started(leaving, other, max_restarts=0)

    async def work() -> None:
        async with pool.at_work():
            hands = [await pool.hands.take(1) for _ in range(in_hand)]
            nodes.draining.add("going")
            async with asyncio.timeout(10):
                while present(pool) != [other]:
                    await asyncio.sleep(0.01)
            assert (await pool.hands.take(1)).worker is other
            for hand in hands:
                assert leaving.killed == (hand.worker is other)
                pool.hands.put_down(hand, 1)
            assert leaving.killed
            assert not other.killed

    asyncio.run(work())


@pytest.mark.parametrize("end", ["it dies", "the work ends"])
def test_a_worker_that_is_about_to_leave_is_not_replaced_twice(nodes: Nodes, end: str) -> None:
    leaving, other = Worker(node="going"), Worker()
    pool = started(leaving, other)

    async def work() -> None:
        async with pool.at_work():
            nodes.draining.add("going")
            assert (await pool.hands.take(FULL)).worker is leaving
            assert (await pool.hands.take(FULL)).worker is other
            if end == "it dies":
                pool.lost(leaving, "its node is gone")
                assert leaving.killed

    asyncio.run(work())
    assert leaving.killed
    assert present(pool) == [other]


def test_workers_that_went_with_their_nodes_are_no_failures(nodes: Nodes) -> None:
    gone, others = Worker(node="gone"), [Worker(node="gone too"), Worker()]
    pool = started(gone, *others, max_restarts=0)

    async def work() -> None:
        async with pool.at_work():
            for worker in (gone, others[0]):
                pool.lost(worker, "its node died")
                await until_present(pool, 1)

    asyncio.run(work())
    assert present(pool) == [others[1]]


def test_below_the_least_number_of_workers_room_is_not_waited_for_for_ever() -> None:
    dead, homeless = Worker(), Worker(room=NEVER)
    pool = started(dead, homeless, start_s=0.2)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "its node died")
            await pool.worker_for(0)

    with pytest.raises(
        ClusterError,
        match=r"0 rollout workers of a are left \(rollout\.min_workers: 1\), and there was no room for another within "
        r"0\.2 s \(cluster\.start_timeout_s\); last: its node died",
    ):
        asyncio.run(work())


@pytest.mark.parametrize("start", [ENGINE_ERROR, NEVER])
def test_a_pool_starts_with_those_that_come_up(start: Exception | float) -> None:
    up, failing, later = Worker(), Worker(start=start), Worker()
    pool = started(up, failing, later, size=2, start_s=0.2)
    assert failing.killed
    assert present(pool) == [up]

    async def work() -> None:
        async with pool.at_work():
            assert await until_present(pool, 2) == [up, later]

    asyncio.run(work())


def test_with_too_few_of_them_it_does_not_start() -> None:
    workers = [Worker(start=NEVER), Worker(start=ENGINE_ERROR), Worker()]
    with pytest.raises(ClusterError, match="an engine of a did not start: no memory"):
        pool_of(*workers, size=3, start_s=0.2, min_workers=2).start(Snapshot(7, "model-7"))
