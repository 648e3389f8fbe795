"""What the driver does when something behind it fails. Workers and sinks are stand-ins; no Ray cluster."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.cluster import Cluster, ClusterError
from actors.rollout import RolloutRequest, RolloutSummary, RolloutWorker
from pipeline.core.agents.program import EngineError
from pipeline.core.config import AgentConfig
from pipeline.core.config_loading import load_config
from pipeline.core.records import Question, ScoreRequest


class Worker:
    """Answers every request with one trajectory; dead from the request with the number `dies_at` on."""

    def __init__(self, *, failures: int = 0, dies_at: float = math.inf, starts: bool = True) -> None:
        self.requests = 0
        self.failures = failures
        self.dies_at = dies_at
        self.rollout = SimpleNamespace(remote=self._rollout)
        self.start = SimpleNamespace(remote=self._start)
        self.starts = starts

    def _rollout(self, request: RolloutRequest) -> tuple[Any, Any]:
        self.requests += 1
        return self._answer(request, self.requests >= self.dies_at), None

    async def _answer(self, request: RolloutRequest, dies: bool) -> RolloutSummary:
        if dies:
            raise RayActorError()
        return RolloutSummary(request.question.id, 1, self.failures, 10, "down" if self.failures else "")

    async def _start(self, version: int) -> str:
        if not self.starts:
            raise RayActorError()
        return "node"


async def nowhere(group: Any, worker: Any) -> None:
    pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A cluster of one given worker; its replacements are given too."""
    monkeypatch.setattr(ray, "kill", lambda actor: None)

    def make(worker: Worker, *replacements: Worker, **rollout: int) -> Any:
        made = Cluster.__new__(Cluster)
        overrides = [f"rollout.{key}={value}" for key, value in rollout.items()]
        made.config = load_config(None, ["rollout.concurrency=1", *overrides])
        made.serving = SimpleNamespace(version=1)  # type: ignore[assignment]
        made._workers, made._nodes = [worker], ["node"]
        spare = iter(replacements)
        made._new_worker = lambda index: next(spare)  # type: ignore[method-assign]
        return made

    return make


def requests(number: int) -> list[RolloutRequest]:
    question = Question("q", "Who?", ("Ada",))
    return [RolloutRequest(question, AgentConfig(), 1, 0.0, 1.0, 0, 0) for _ in range(number)]


def sample(cluster: Any, number: int, sink: Any = nowhere) -> list[RolloutSummary]:
    return asyncio.run(cluster._sample(requests(number), sink, lambda summary: None))


def test_a_phase_of_few_trajectories_that_all_fail_is_no_result(cluster: Callable[..., Any]) -> None:
    with pytest.raises(ClusterError, match=r"3 of 3 trajectories failed .* last: down"):
        sample(cluster(Worker(failures=1)), 3)


def test_requests_of_a_dead_worker_go_to_its_replacement(cluster: Callable[..., Any]) -> None:
    first, second = Worker(dies_at=2), Worker()
    assert len(sample(cluster(first, second), 5)) == 5
    assert second.requests >= 3


def test_a_replacement_that_dies_while_it_starts_is_replaced_too(cluster: Callable[..., Any]) -> None:
    last = Worker()
    assert len(sample(cluster(Worker(dies_at=1), Worker(starts=False), last, max_restarts=2), 2)) == 2
    assert last.requests == 2


def test_restarts_are_bounded(cluster: Callable[..., Any]) -> None:
    dying = [Worker(starts=False) for _ in range(3)]
    with pytest.raises(ClusterError, match=r"died 3 times in one phase \(rollout\.max_restarts: 2\)"):
        sample(cluster(Worker(dies_at=1), *dying, max_restarts=2), 2)


def test_a_worker_that_dies_under_the_sink_is_replaced(cluster: Callable[..., Any]) -> None:
    async def sink(group: Any, worker: Worker) -> None:
        if worker is first:
            raise RayTaskError("add", "traceback", RayActorError())

    first, second = Worker(), Worker()
    assert len(sample(cluster(first, second), 1, sink)) == 1
    assert second.requests == 1


def test_a_dead_weighting_actor_is_not_taken_for_a_dead_worker(cluster: Callable[..., Any]) -> None:
    async def sink(group: Any, worker: Worker) -> None:
        raise RayActorError()

    with pytest.raises(ClusterError, match="the weighting actor died"):
        sample(cluster(Worker()), 1, sink)


@pytest.mark.parametrize(("failures", "succeeds"), [(0, True), (1, True), (2, False)])
def test_scoring_that_the_engine_fails_is_tried_once_more(failures: int, succeeds: bool) -> None:
    calls = 0

    async def score(token_ids: Sequence[int], start: int) -> float:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise EngineError("busy")
        return -1.5

    worker = RolloutWorker.__new__(RolloutWorker)
    worker.engine = SimpleNamespace(score=score, is_dead=False)  # type: ignore[assignment]
    request = ScoreRequest(np.arange(4, dtype=np.int32), 2)
    if succeeds:
        assert asyncio.run(worker.score([request])) == [-1.5]
    else:
        with pytest.raises(EngineError, match="busy"):
            asyncio.run(worker.score([request]))
