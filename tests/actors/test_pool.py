"""How a pool replaces workers that fail to start, hang or are lost for good. Workers are stand-ins; no Ray cluster."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors import pool as module
from actors.engine import EngineOptions
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from actors.session import ClusterError
from pipeline.core.agents.program import EngineError
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import Snapshot

PLACEMENT = PolicyPlacement("shared_memory", [0, 1, 2], [], 0.0, 0.0, 0.0)
HEARTBEAT_S = 0.2
NEVER = 3600.0


class Worker:
    """An actor's handle. `start` and `ping` are what comes of these calls: an error, or seconds until they answer."""

    def __init__(self, start: Exception | float = 0.0, ping: Exception | float = 0.0) -> None:
        self.start = SimpleNamespace(remote=lambda version: self._answer(start, version))
        self.ping = SimpleNamespace(remote=lambda: self._answer(ping, self.version))
        self.version: int | None = None
        self.killed = False

    async def _answer(self, outcome: Exception | float, version: int | None) -> str:
        if isinstance(outcome, Exception):
            raise outcome
        await asyncio.sleep(outcome)
        self.version = version
        return "node"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda worker: setattr(worker, "killed", True))
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(
        module, "wait_for", lambda calls, seconds, what: [asyncio.run(call) for call in calls]
    )


def started(*workers: Worker, size: int = 1, start_s: float = 30.0, **settings: Any) -> EnginePool:
    """A pool of the first `size` workers that serves version 7; the others are their replacements, in this order."""
    cluster = ClusterConfig(start_timeout_s=start_s, heartbeat_timeout_s=HEARTBEAT_S)
    rollout = RolloutConfig(workers=size, **settings)
    made = EnginePool("a", EngineOptions("model"), rollout, cluster, PLACEMENT, dict, None)  # type: ignore[arg-type]
    spare = iter(workers)
    made._new_worker = lambda index: next(spare)  # type: ignore[method-assign]
    made.start(Snapshot(7, "model-7"))
    return made


def present(pool: EnginePool) -> list[Any]:
    return [receiver.handle for receiver in pool.receivers()]


async def until_present(pool: EnginePool, number: int) -> list[Any]:
    async with asyncio.timeout(10):
        while len(present(pool)) < number:
            await asyncio.sleep(0.01)
    return present(pool)


ENGINE_ERROR = RayTaskError("start", "a traceback", EngineError("no memory"))


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


def test_while_a_worker_is_away_its_slots_are_spread_over_the_others_and_then_come_back() -> None:
    dead, second, third, replacement = Worker(), Worker(), Worker(), Worker(start=0.1)
    pool = started(dead, second, third, replacement, size=3)

    async def work() -> None:
        async with pool.at_work():
            assert [await pool.worker_for(slot) for slot in range(6)] == [dead, second, third] * 2
            pool.lost(dead, "it died")
            pool.lost(dead, "somebody else noticed too")
            assert [await pool.worker_for(slot) for slot in (0, 3, 6)] == [second, third, second]
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


def test_a_replacement_that_is_not_up_when_the_work_ends_is_ended() -> None:
    dead, other, slow = Worker(), Worker(), Worker(start=NEVER)
    pool = started(dead, other, slow, size=2)

    async def work() -> None:
        async with pool.at_work():
            pool.lost(dead, "it died")
            await asyncio.sleep(0.05)

    asyncio.run(work())
    assert slow.killed
    assert present(pool) == [other]


def test_an_error_of_the_work_itself_comes_out_as_it_is() -> None:
    pool = started(Worker())

    async def work() -> None:
        async with pool.at_work():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(work())
