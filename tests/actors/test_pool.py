"""How a pool replaces workers that fail to start, hang or are lost for good."""

from __future__ import annotations

import asyncio
import logging

import pytest
from ray.exceptions import RayActorError

from actors.engine_options import EngineOptions
from actors.engine_use import EngineUse
from actors.session import ClusterError
from tests.actors.pools import (
    ENGINE_ERROR,
    HEARTBEAT_S,
    NEVER,
    Worker,
    present,
    started,
    until_present,
    without_ray,
)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


@pytest.mark.parametrize("start", [ENGINE_ERROR, RayActorError(), NEVER])
def test_a_replacement_that_does_not_start_is_ended_and_tried_again(
    start: Exception | float, caplog: pytest.LogCaptureFixture
) -> None:
    dead, failing, last = Worker(), Worker(start=start), Worker()
    pool = started(dead, failing, last, start_s=0.3)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            assert await pool.worker_for(0) is last

    asyncio.run(work())
    assert failing.killed and dead.killed and not last.killed
    assert last.version == 7
    assert "rollout worker 0 of a: a new engine did not start" in caplog.text


def test_replacements_that_fail_too_often_end_the_work_with_the_last_cause() -> None:
    dead = Worker()
    pool = started(dead, *(Worker(start=ENGINE_ERROR) for _ in range(2)))

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            await pool.worker_for(0)

    with pytest.raises(
        ClusterError,
        match=r"of a failed 3 times in one phase \(rollout\.max_restarts: 2\); 0 of 1 are left "
        r"\(rollout\.min_workers: 1\); last: a new engine did not start: no memory",
    ):
        asyncio.run(work())


@pytest.mark.parametrize("ping", [NEVER, ENGINE_ERROR, RayActorError()])
def test_a_worker_that_does_not_answer_a_heartbeat_is_replaced(ping: Exception | float) -> None:
    silent, other, replacement = Worker(ping=ping), Worker(), Worker()
    pool = started(silent, other, replacement, size=2)

    async def work() -> None:
        async with pool.at_work():
            async with asyncio.timeout(10):
                while not silent.killed:
                    await asyncio.sleep(0.01)
            assert await until_present(pool, 2) == [replacement, other]

    asyncio.run(work())
    assert not other.killed


def test_a_slow_start_is_no_missed_heartbeat() -> None:
    dead, slow = Worker(), Worker(start=3 * HEARTBEAT_S)
    pool = started(dead, slow)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            assert await pool.worker_for(0) is slow

    asyncio.run(work())


def test_calls_are_spread_over_the_workers_that_are_there() -> None:
    dead, second, third, replacement = Worker(), Worker(), Worker(), Worker(start=0.1)
    pool = started(dead, second, third, replacement, size=3)

    async def work() -> None:
        async with pool.at_work():
            assert [await pool.worker_for(number) for number in range(6)] == [dead, second, third] * 2
            pool.lost(dead, "it died")
            pool.lost(dead, "somebody else noticed too")
            assert [await pool.worker_for(number) for number in range(4)] == [second, third] * 2
            await until_present(pool, 3)
            assert await pool.worker_for(3) is replacement

    asyncio.run(work())


def test_the_work_goes_on_with_fewer_workers_and_the_lost_one_is_tried_again_next_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dead, other, failing, replacement = Worker(), Worker(), Worker(start=ENGINE_ERROR), Worker()
    pool = started(dead, other, failing, replacement, size=2, max_restarts=1)

    async def lose() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            while "goes on without worker 0, with 1 of 2" not in caplog.text:
                await asyncio.sleep(0.01)
            assert await pool.worker_for(0) is other

    async def again() -> None:
        async with pool.at_work():
            assert await until_present(pool, 2) == [replacement, other]

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(lose(), 10))
    asyncio.run(again())


def test_below_the_least_number_of_workers_the_work_ends() -> None:
    dead, other = Worker(), Worker()
    pool = started(dead, other, size=2, max_restarts=0, min_workers=2)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            await asyncio.sleep(60)

    with pytest.raises(ClusterError, match=r"1 of 2 are left \(rollout\.min_workers: 2\); last: it died"):
        asyncio.run(work())


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_replacement_that_is_not_up_when_the_work_ends_stays_unless_a_learner_needs_the_memory(
    sleeps: bool,
) -> None:
    dead, other, slow = Worker(), Worker(), Worker(start=NEVER)
    pool = started(dead, other, slow, size=2, sleeps=sleeps)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            await asyncio.sleep(0.05)

    asyncio.run(work())
    assert slow.killed == sleeps
    assert present(pool) == [other]


def test_an_error_of_the_work_itself_comes_out_as_it_is() -> None:
    pool = started(Worker())

    async def work() -> None:
        async with pool.at_work():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(work())


# ---------------------------------------------------------------- how many agents


def test_as_many_agents_are_in_flight_as_fit_into_the_smallest_cache() -> None:
    assert started(Worker(fit=90), Worker(fit=80), size=2).agents_per_worker == 80


def test_but_no_more_than_an_engine_takes_at_once() -> None:
    assert started(Worker(fit=10_000)).agents_per_worker == EngineOptions("model").max_num_seqs


def test_more_agents_than_fit_are_taken_where_they_are_asked_for_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert started(Worker(fit=90), concurrency=100).agents_per_worker == 100
    assert "holds 90 agents of half of model.max_length, fewer than rollout.concurrency: 100" in caplog.text


def test_what_fits_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert started(Worker(fit=100), concurrency=100).agents_per_worker == 100
    assert caplog.text == ""


def test_uses_are_of_the_workers_that_answer() -> None:
    working, hanging = Worker(), Worker(ping=NEVER)
    pool = started(working, hanging, size=2)
    working.done = EngineUse(prompt_tokens=100, cached_tokens=80)

    assert pool.uses() == {working: EngineUse(prompt_tokens=100, cached_tokens=80)}


def test_engines_at_work_are_not_brought_to_another_version() -> None:
    pool = started(Worker())

    async def work() -> None:
        async with pool.at_work():
            with pytest.raises(
                ClusterError, match=r"engines of a are sampling with version 7; .* to serve version 8"
            ):
                pool.must_be_idle("to serve version 8")

    asyncio.run(work())
    pool.must_be_idle("to serve version 8")
