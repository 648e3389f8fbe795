"""What a worker does with a program, whatever its engine and its peers do; engines are stand-ins, no Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors import rollout
from actors.engine_options import EngineOptions
from actors.rollout import Peer, PeerDied, RemoteModel, RolloutRequest, RolloutWorker
from actors.slots import Slots
from pipeline.core.agents.program import GREEDY, Completion, EngineError, Model, Retrieve, Sampling
from pipeline.core.agents.transcript import Transcript
from pipeline.core.records import Episode, Question, ScoreRequest, StopReason
from pipeline.core.shards import Counts

TASK = Question("q", "Who?", ("Ada",))


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "load_tokenizer", lambda model: model)


class Engine:
    """Scores -1.5 a token, after so many failures."""

    def __init__(self, failures: int = 0) -> None:
        self.calls, self.failures = 0, failures
        self.is_dead = False
        self.options = EngineOptions("model", max_model_len=64)
        self.weights = SimpleNamespace(version=4)

    async def generate(self, *arguments: Any) -> Any:
        raise AssertionError("not asked for here")

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        self.calls += 1
        if self.calls <= self.failures:
            raise EngineError("busy")
        return [-1.5] * (len(token_ids) - start)


def worker(engine: Engine) -> RolloutWorker:
    made = RolloutWorker.__new__(RolloutWorker)
    made.options, made.engine, made._slots = engine.options, engine, Slots(2)  # type: ignore[assignment]
    made.retriever = SimpleNamespace(search=None)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(("failures", "succeeds"), [(0, True), (1, True), (2, False)])
def test_scoring_that_the_engine_fails_is_tried_once_more(failures: int, succeeds: bool) -> None:
    scoring = worker(Engine(failures)).token_logprobs([ScoreRequest(np.arange(4, dtype=np.int32), 2)])
    if succeeds:
        assert asyncio.run(scoring) == [[-1.5, -1.5]]
    else:
        with pytest.raises(EngineError, match="busy"):
            asyncio.run(scoring)


# ---------------------------------------------------------------- programs


@dataclass
class Scripted:
    """An episode that fails the first `failures` times; it asks the role `judge`, if there is one, for a score."""

    failures: int = 0
    runs: int = 0
    seeds: tuple[int, ...] = ()

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        self.runs += 1
        self.seeds += (sampling.seed,)
        reason = StopReason.ENGINE_ERROR if self.runs <= self.failures else StopReason.ANSWERED
        if "judge" in roles:
            try:
                await roles["judge"].token_logprobs([1, 2], 1)
            except EngineError:
                reason = StopReason.ENGINE_ERROR
        transcript = Transcript()
        transcript.append_model(Completion([5, 6], [-1.0, -1.0], "", None, "eos"))
        turn = transcript.trajectory(
            question_id=task.id,
            sample=sample,
            role="a",
            policy_version=roles["a"].version,
            stop_reason=reason,
            detail="down" if reason.is_infrastructure else "",
        )
        return Episode(task.id, sample, (turn,))


def request(program: Scripted, samples: int = 1, **peers: Any) -> RolloutRequest:
    others = {name: Peer(handle, EngineOptions("other"), 9) for name, handle in peers.items()}
    return RolloutRequest(TASK, program, samples, GREEDY, ("a",), others)


@pytest.mark.parametrize(("failures", "failed"), [(1, 0), (2, 1)])
def test_an_episode_that_the_infrastructure_ended_is_run_once_more(failures: int, failed: int) -> None:
    program = Scripted(failures)
    receipt, episodes = asyncio.run(worker(Engine()).rollout(request(program)))  # type: ignore[misc]
    assert (program.runs, receipt.counts.infrastructure_failures) == (2, failed)
    assert episodes[0].turns[0].policy_version == 4


def test_samples_have_seeds_of_their_own_and_the_same_at_every_run() -> None:
    first, second = Scripted(), Scripted()
    for program in (first, second):
        asyncio.run(worker(Engine()).rollout(request(program, samples=5)))  # type: ignore[arg-type]
    assert len(set(first.seeds)) == 5
    assert first.seeds == second.seeds


def test_further_samples_go_on_from_those_that_asked_for_them() -> None:
    asked: list[list[int]] = []

    class Three:
        most = 3

        def __call__(self, episodes: Sequence[Episode]) -> int:
            asked.append([episode.sample for episode in episodes])
            return 3

    fixed, more = Scripted(), Scripted()
    asyncio.run(worker(Engine()).rollout(request(fixed, samples=5)))  # type: ignore[arg-type]
    asked_for = replace(request(more, samples=2), further=Three())
    receipt, episodes = asyncio.run(worker(Engine()).rollout(asked_for))  # type: ignore[misc]
    assert asked == [[0, 1]]
    assert [episode.sample for episode in episodes] == [0, 1, 2, 3, 4]
    assert receipt.counts.episodes == 5
    assert more.seeds == fixed.seeds


def test_the_seed_of_a_sample_depends_on_its_number_and_its_task_alone() -> None:
    few, many, elsewhere = Scripted(), Scripted(), Scripted()
    for program, samples in ((few, 2), (many, 5)):
        asyncio.run(worker(Engine()).rollout(request(program, samples)))  # type: ignore[arg-type]
    other = replace(request(elsewhere, 5), task=Question("r", "Who?", ("Ada",)))
    asyncio.run(worker(Engine()).rollout(other))  # type: ignore[arg-type]
    assert many.seeds[:2] == few.seeds
    assert not set(elsewhere.seeds) & set(many.seeds)


def test_an_episode_that_is_run_again_is_the_same_episode() -> None:
    program = Scripted(failures=1)
    asyncio.run(worker(Engine()).rollout(request(program)))  # type: ignore[arg-type]
    assert program.seeds[0] == program.seeds[1]


@pytest.mark.parametrize(("failures", "failed", "last"), [(0, 0, ""), (6, 3, "down")])
def test_the_driver_is_told_counts(failures: int, failed: int, last: str) -> None:
    program = Scripted(failures)
    receipt, episodes = asyncio.run(worker(Engine()).rollout(request(program, samples=3)))  # type: ignore[misc]
    assert [episode.sample for episode in episodes] == [0, 1, 2]
    assert receipt.counts == Counts(3, 6, failed, last)


class Exited(BaseException):
    """In the place of the end of the process."""


def test_a_worker_whose_engine_died_ends_so_that_it_is_replaced_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(code: int) -> None:
        raise Exited

    monkeypatch.setattr(rollout.os, "_exit", leave)
    engine = Engine(failures=1)
    engine.is_dead = True
    with pytest.raises(Exited):
        asyncio.run(worker(engine).token_logprobs([ScoreRequest.of([1, 2], 1)]))
    with pytest.raises(Exited):
        asyncio.run(worker(engine).rollout(request(Scripted(failures=1))))  # type: ignore[arg-type]


# ---------------------------------------------------------------- other policies' workers


def handle(error: Exception | None) -> Any:
    """A peer's actor that answers, or fails so."""

    async def answer(requests: Sequence[ScoreRequest]) -> list[list[float]]:
        if error is not None:
            raise error
        return [[-2.0] * (len(r.token_ids) - r.start) for r in requests]

    async def generate(prompt_ids: list[int], sampling: Sampling) -> Completion:
        if error is not None:
            raise error
        return Completion([*prompt_ids, 9], [-1.0] * (len(prompt_ids) + 1), "text", None, "eos")

    return SimpleNamespace(
        token_logprobs=SimpleNamespace(remote=answer), generate=SimpleNamespace(remote=generate)
    )


def test_another_policys_worker_answers_for_its_role() -> None:
    receipt, _ = asyncio.run(worker(Engine()).rollout(request(Scripted(), judge=handle(None))))  # type: ignore[misc]
    assert receipt.counts.infrastructure_failures == 0


def test_the_death_of_another_policys_worker_is_told_with_its_role() -> None:
    with pytest.raises(PeerDied, match="the worker of the role judge died"):
        asyncio.run(worker(Engine()).rollout(request(Scripted(), judge=handle(RayActorError()))))  # type: ignore[arg-type]


def test_a_role_elsewhere_writes_and_scores_as_one_here_would() -> None:
    model = RemoteModel("judge", Peer(handle(None), EngineOptions("other"), 9))
    assert asyncio.run(model.generate((3, 4), GREEDY)).token_ids == [3, 4, 9]
    assert asyncio.run(model.token_logprobs([1, 2, 3], 1)) == [-2.0, -2.0]


def test_a_dead_peer_is_an_engine_error_to_the_program_and_known_to_be_dead() -> None:
    model = RemoteModel("judge", Peer(handle(RayActorError()), EngineOptions("other"), 9))
    with pytest.raises(EngineError, match="the worker of the role judge died"):
        asyncio.run(model.generate([1], GREEDY))
    assert model.is_dead


def test_a_peers_death_keeps_its_role_on_its_way_to_the_driver() -> None:
    died = pickle.loads(pickle.dumps(PeerDied("judge")))
    assert (died.role, str(died)) == ("judge", "the worker of the role judge died")


def test_a_bug_in_a_peer_is_not_taken_for_a_failure_of_its_engine() -> None:
    broken = handle(RayTaskError("generate", "traceback", ZeroDivisionError()))
    with pytest.raises(RayTaskError):
        asyncio.run(RemoteModel("judge", Peer(broken, EngineOptions("other"), 9)).generate([1], GREEDY))


def test_a_peers_engine_error_is_one_here_and_nobody_died() -> None:
    failing = handle(RayTaskError("score", "traceback", EngineError("too long")))
    model = RemoteModel("judge", Peer(failing, EngineOptions("other", max_model_len=32), 9))
    with pytest.raises(EngineError, match="role judge: too long"):
        asyncio.run(model.token_logprobs([1, 2], 1))
    assert not model.is_dead
    assert (model.version, model.max_length) == (9, 32)
