"""Which version a policy is, serves and trains, and who makes room for whom. Engines and learners are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from actors import policy as module
from actors.engine_options import EngineOptions
from actors.learner_group import LearnerError
from actors.placement import PolicyPlacement
from actors.policy import Policy, Turns
from actors.session import ClusterError
from actors.weight_transfer import EngineRef, PushReport, WeightTransferError
from pipeline.core.config import LearnerConfig, ModelConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import ScoreRequest

BASE = ModelConfig(path="base")
PLACEMENT = PolicyPlacement("shared_memory", [0], [0], 0.0, 0.0, 0.0)
FIRST, SECOND = Snapshot(1, "model-1", Path("state-1")), Snapshot(2, "model-2", Path("state-2"))


class Log(list[str]):
    """What was asked of whom, in order."""


class Pool:
    def __init__(self, name: str, log: Log, serving: int | None = 0) -> None:
        self.name, self.log, self.serving = name, log, serving
        self.workers: list[Any] = [name]
        self.options = EngineOptions("model", request_timeout_s=5.0)

    def must_be_idle(self, why: str) -> None:
        pass

    def sleep(self) -> None:
        self.log.append(f"{self.name} sleeps")
        self.serving = None

    def reload(self, snapshot: Snapshot) -> None:
        self.log.append(f"{self.name} loads {snapshot.model}")
        self.now_serves(snapshot)

    def now_serves(self, snapshot: Snapshot) -> None:
        self.serving = snapshot.version

    def lose_silent(self) -> None:
        pass

    def lost(self, worker: Any, cause: str) -> None:
        self.log.append(f"{worker} is lost: {cause}")
        self.workers.remove(worker)

    def receivers(self) -> list[EngineRef]:
        return [EngineRef(worker, "node") for worker in self.workers]

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        yield

    async def worker_for(self, slot: int) -> Any:
        return self.workers[slot % len(self.workers)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    calls = Log()

    class Group:
        """A learner group."""

        def __init__(self, config: Any, model: str, *, state: Path | None, **options: Any) -> None:
            calls.append(f"learner on {model}" + (f" at {state}" if state else ""))

        def train(self, shards: Any, loss: Any, **options: Any) -> str:
            calls.append("train")
            return "report"

        def save(self, state: Path, model: Path) -> None:
            calls.append(f"save {state} {model}")

        def push(self, receivers: Any, transport: Any, version: int, **options: Any) -> Any:
            calls.append(f"push {version} to {[receiver.handle for receiver in receivers]}")
            return PushReport(version, "digest", nbytes=1, tensors=1, seconds=0.1)

        def rest(self) -> None:
            calls.append("learner rests")

        def close(self) -> None:
            calls.append("learner ends")

    monkeypatch.setattr(module, "LearnerGroup", Group)
    return calls


def make(
    log: Log,
    name: str = "a",
    *,
    turns: Turns | None = None,
    learner: bool = True,
    sampled: bool = True,
    serving: int | None = 0,
) -> Policy:
    spec = PolicySpec(name, BASE, RolloutConfig() if sampled else None, LearnerConfig() if learner else None)
    return Policy(
        spec,
        Snapshot(0, "base"),
        Pool(name, log, serving) if sampled else None,  # type: ignore[arg-type]
        placement=PLACEMENT,
        rank_options=[{}],
        turns=turns or Turns(take_turns=False, park_on_disk=False),
        push_timeout_s=1.0,
    )


def train(policy: Policy) -> Any:
    return policy.train([], None, state=Path("state"), seed=0)  # type: ignore[arg-type]


def save(policy: Policy, version: int) -> Snapshot:
    return policy.save(version, state=Path(f"state-{version}"), model=Path(f"model-{version}"))


def test_to_be_another_version_costs_nothing_until_it_is_needed(log: Log) -> None:
    policy = make(log)
    policy.restore(FIRST)
    policy.restore(SECOND)
    assert log == []
    assert policy.push() is None
    assert log == ["a loads model-2"]
    assert policy.push() is None
    assert log == ["a loads model-2"]


def test_what_the_learner_holds_is_pushed_and_anything_else_is_loaded(log: Log) -> None:
    policy = make(log)
    assert train(policy) == "report"
    assert save(policy, 1) == FIRST == policy.current
    report = policy.push()
    assert report is not None and report.version == 1
    policy.restore(SECOND)
    assert policy.push() is None
    assert log[-3:] == ["save state-1 model-1", "push 1 to ['a']", "a loads model-2"]


def pushes(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    """Every push of a learner ends so."""

    def push(*arguments: Any, **options: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(module.LearnerGroup, "push", push)


def test_an_engine_that_missed_a_push_is_lost_and_the_others_serve_it(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make(log)
    assert policy.pool is not None
    policy.pool.workers.append("b")  # type: ignore[attr-defined]
    pushes(monkeypatch, PushReport(1, "digest", 0, 0, 0.0, {1: "it died"}))
    train(policy)
    save(policy, 1)
    assert policy.push() is not None
    assert log[-1] == "b is lost: it missed version 1: it died"
    assert policy.pool.serving == 1


@pytest.mark.parametrize(
    ("error", "transport", "learner_ends"),
    [
        (WeightTransferError("no engine confirmed"), "shared_memory", False),
        (WeightTransferError("the broadcast broke"), "nccl", True),
        (RayActorError(), "shared_memory", True),
        (LearnerError("not in time"), "nccl", True),
    ],
)
def test_after_a_push_that_failed_the_engines_load_the_version_from_disk(
    log: Log, monkeypatch: pytest.MonkeyPatch, error: Exception, transport: Any, learner_ends: bool
) -> None:
    policy = make(log)
    policy._placement = replace(PLACEMENT, transport=transport)
    pushes(monkeypatch, error)
    train(policy)
    save(policy, 1)
    assert policy.push() is None
    assert policy.pool is not None and policy.pool.serving == 1
    assert log[-1] == "a loads model-1"
    assert ("learner ends" in log) == learner_ends
    train(policy)
    assert ("learner on base at state-1" in log) == learner_ends


def test_where_no_engine_is_left_nothing_is_pushed(log: Log) -> None:
    policy = make(log)
    train(policy)
    save(policy, 1)
    policy.pool.workers.clear()  # type: ignore[union-attr]
    assert policy.push() is None
    assert log[-1] == "a loads model-1"


def test_weights_that_belong_to_no_version_are_never_pushed(log: Log) -> None:
    policy = make(log, serving=None)
    train(policy)
    policy.push()
    assert log[-1] == "a loads base"


def test_training_goes_on_where_the_learner_is_or_from_a_checkpoint_over_the_first_model(log: Log) -> None:
    policy = make(log)
    train(policy)
    save(policy, 1)
    train(policy)
    assert log.count("learner on base") == 1
    save(policy, 2)
    policy.restore(FIRST)
    train(policy)
    assert log[-3:] == ["learner ends", "learner on base at state-1", "train"]


def test_an_interrupted_training_starts_again_from_its_version(log: Log) -> None:
    policy = make(log)
    train(policy)
    policy.restore(FIRST)
    train(policy)
    assert log[-3:] == ["learner ends", "learner on base at state-1", "train"]


def test_a_frozen_policy_is_not_trained_and_starts_no_rank(log: Log) -> None:
    with pytest.raises(ClusterError, match="a is frozen and cannot be trained"):
        train(make(log, learner=False))
    assert log == []


def test_a_policy_without_engines_is_neither_sampled_nor_scored(log: Log) -> None:
    policy = make(log, sampled=False)
    for ask in (policy.push, lambda: policy.score([])):
        with pytest.raises(ClusterError, match="a has no engines"):
            ask()


def test_scores_come_in_the_order_of_the_spans_from_all_workers_at_the_current_version(log: Log) -> None:
    policy, pool = make(log), Pool("a", log)
    policy.pool = pool  # type: ignore[assignment]
    pool.workers = [scorer(log, "first"), scorer(log, "second")]
    policy.restore(FIRST)
    spans = [ScoreRequest.of([7, 8, number], 1) for number in range(150)]
    scores = policy.score(spans)
    assert log == ["a loads model-1", "first scores 64", "second scores 64", "first scores 22"]
    assert [score.tolist() for score in scores] == [[-8.0, -number] for number in range(150)]
    assert {score.dtype for score in scores} == {np.dtype(np.float32)}
    assert policy.score([]) == []


def test_spans_of_a_worker_that_dies_are_scored_by_another(log: Log) -> None:
    policy, pool = make(log), Pool("a", log)
    policy.pool = pool  # type: ignore[assignment]
    pool.workers = [scorer(log, "first", RayActorError()), scorer(log, "second")]
    assert [score.tolist() for score in policy.score([ScoreRequest.of([7, 8], 1)] * 65)] == [[-8.0]] * 65
    assert len(pool.workers) == 1


def test_scoring_is_bounded(log: Log) -> None:
    policy, pool = make(log), Pool("a", log)
    policy.pool = pool  # type: ignore[assignment]
    pool.options = replace(pool.options, request_timeout_s=0.05)

    async def never(spans: Any) -> None:
        await asyncio.sleep(60)

    pool.workers = [SimpleNamespace(token_logprobs=SimpleNamespace(remote=never))]
    with pytest.raises(ClusterError, match=r"for a to score 1 spans \(rollout\.timeout_s\)"):
        policy.score([ScoreRequest.of([7, 8], 1)])


def scorer(log: Log, name: str, error: Exception | None = None) -> Any:
    """A worker for which log p of a token is minus its id."""

    async def answer(spans: Sequence[ScoreRequest]) -> list[list[float]]:
        if error is not None:
            raise error
        log.append(f"{name} scores {len(spans)}")
        return [(-span.token_ids[span.start :].astype(float)).tolist() for span in spans]

    return SimpleNamespace(token_logprobs=SimpleNamespace(remote=answer))


def test_what_was_not_trained_cannot_be_saved(log: Log) -> None:
    with pytest.raises(ClusterError, match="a has not been trained and cannot be saved"):
        save(make(log), 1)


@pytest.mark.parametrize("spec", [{}, {"rollout": RolloutConfig(), "head": "value"}])
def test_policies_that_cannot_be_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="policy a"):
        PolicySpec("a", BASE, **spec)


# ---------------------------------------------------------------- taking turns


def test_on_shared_gpus_engines_sleep_while_one_trains_and_learners_rest_while_they_sample(log: Log) -> None:
    turns = Turns(take_turns=True, park_on_disk=False)
    one, other = make(log, "one", turns=turns), make(log, "other", turns=turns)
    train(one)
    assert log == ["one sleeps", "other sleeps", "learner on base", "train"]
    save(one, 1)
    log.clear()
    train(other)
    assert log[0] == "learner rests"
    save(other, 1)
    log.clear()
    one.push()
    assert log == ["learner rests", "learner rests", "push 1 to ['one']"]


def test_a_parked_learner_comes_back_from_its_checkpoint(log: Log) -> None:
    turns = Turns(take_turns=False, park_on_disk=True)
    one, other = make(log, "one", turns=turns), make(log, "other", turns=turns)
    train(one)
    save(one, 1)
    train(other)
    save(other, 1)
    log.clear()
    assert one.push() is None
    train(one)
    assert log == ["one loads model-1", "learner ends", "learner on base at state-1", "train"]


def test_a_learner_that_was_not_saved_is_not_parked(log: Log) -> None:
    turns = Turns(take_turns=False, park_on_disk=True)
    one, other = make(log, "one", turns=turns), make(log, "other", turns=turns)
    train(one)
    with pytest.raises(ClusterError, match="learner of one must be saved before another policy trains"):
        train(other)


def test_by_default_learners_stay_where_they_are(log: Log) -> None:
    turns = Turns(take_turns=False, park_on_disk=False)
    one, other = make(log, "one", turns=turns), make(log, "other", turns=turns)
    train(one)
    train(other)
    assert "learner ends" not in log
