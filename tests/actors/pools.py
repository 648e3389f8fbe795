"""A pool of stand-in workers, without a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError, RayTaskError

from actors import pool as pool_module
from actors import shift as shift_module
from actors.engine_options import EngineOptions
from actors.engine_use import EngineUse
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from pipeline.core.agents.program import EngineError
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import Snapshot

HEARTBEAT_S = 0.2
NEVER = 3600.0
ENGINE_ERROR = RayTaskError("start", "a traceback", EngineError("no memory"))


class Call:
    """What `method.remote(...)` gives back: it can be awaited more than once, as a reference can."""

    def __init__(self, answer: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._answer = answer

    def __await__(self) -> Any:
        return self._answer().__await__()


class Worker:
    """An actor's handle. What comes of calls is an error, or seconds until they answer.

    Args:
        room: seconds until there is a place for it.
        start, ping: what comes of these calls.
        node: where it lives.
        fit: agents that fit into its cache.
    """

    def __init__(
        self,
        start: Exception | float = 0.0,
        ping: Exception | float = 0.0,
        *,
        room: float = 0.0,
        node: str = "node",
        fit: int = 1000,
    ) -> None:
        self.fit, self.done = fit, EngineUse()
        self.version: int | None = None
        self.loaded: str | None = None
        self.killed = False
        self.where = _method(lambda: self._answer(room, node))
        self.ping = _method(lambda: self._answer(ping))
        self.start = _method(lambda model, version: self._serve(start, model, version))
        self.use = _method(lambda: self._answer(ping, self.done))
        self.reload = _method(lambda model, version, seconds: self._serve(0.0, model, version))

    async def _serve(self, outcome: Exception | float, model: str, version: int) -> int:
        await self._answer(outcome)
        self.version, self.loaded = version, model
        return self.fit

    async def _answer(self, outcome: Exception | float, value: Any = "") -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        await asyncio.sleep(outcome)
        return value


def _method(answer: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
    return SimpleNamespace(remote=lambda *arguments: Call(lambda: answer(*arguments)))


class Nodes:
    """What Ray says of its nodes."""

    def __init__(self) -> None:
        self.alive, self.draining = {"node"}, set[str]()


def without_ray(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Pools work on stand-ins, and quickly."""
    nodes = Nodes()
    monkeypatch.setattr(ray, "kill", lambda worker: setattr(worker, "killed", True))
    monkeypatch.setattr(shift_module, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(shift_module, "NODES_EVERY_S", 0.01)
    monkeypatch.setattr(shift_module, "NODE_NEWS_S", 0.01)
    monkeypatch.setattr(shift_module, "alive_nodes", lambda: nodes.alive)
    monkeypatch.setattr(shift_module, "draining_nodes", lambda: nodes.draining)
    monkeypatch.setattr(
        pool_module, "outcomes", lambda calls, seconds: [_outcome(call, seconds) for call in calls]
    )
    return nodes


def _outcome(call: Call, seconds: float) -> Any:
    async def wait() -> Any:
        return await asyncio.wait_for(call, seconds)

    try:
        return asyncio.run(wait())
    except RayError as error:
        return error
    except TimeoutError:
        return ray.exceptions.GetTimeoutError()


def pool_of(
    *workers: Worker, size: int = 1, start_s: float = 30.0, sleeps: bool = False, **settings: Any
) -> EnginePool:
    """A pool that starts with the first `size` workers; the others come after them, in this order."""
    cluster = ClusterConfig(start_timeout_s=start_s, heartbeat_timeout_s=HEARTBEAT_S)
    rollout = RolloutConfig(workers=size, **settings)
    placement = PolicyPlacement("shared_memory", list(range(size)), [], 0.0, 0.0, 0.0)
    options, retriever = EngineOptions("model", sleeps=sleeps), None
    made = EnginePool("a", options, rollout, cluster, placement, dict, retriever)  # type: ignore[arg-type]
    spare = iter(workers)
    made._new_worker = lambda index: next(spare)  # type: ignore[method-assign]
    return made


def started(*workers: Worker, **options: Any) -> EnginePool:
    """Such a pool, which serves version 7."""
    made = pool_of(*workers, **options)
    made.start(Snapshot(7, "model-7"))
    return made


def present(pool: EnginePool) -> list[Any]:
    return [receiver.handle for receiver in pool.receivers()]


async def until_present(pool: EnginePool, number: int) -> list[Any]:
    async with asyncio.timeout(10):
        while len(present(pool)) < number:
            await asyncio.sleep(0.01)
    return present(pool)
