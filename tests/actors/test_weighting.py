"""The weighting actor as a plain object; a small fake stands in for the rollout worker that scores."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.weighting import Weighting
from pipeline.core.config import Config
from pipeline.core.records import (
    Example,
    Question,
    ScoreRequest,
    StopReason,
    Trajectory,
    examples_from_table,
    trajectories_from_table,
)
from pipeline.core.renderer import Renderer
from pipeline.core.weighting import Scored, importance_weights, summarise

SILVER_HARP = Question("q1", "Who founded the maker of the Silver Harp?", ("Mara Velin", "M. Velin"))
ANSWERED, FAILED, DIED = StopReason.ANSWERED, StopReason.RETRIEVER_UNAVAILABLE, StopReason.ENGINE_ERROR


class _Method:
    """An actor's method: `remote` gives something to await."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class FakeWorker:
    """Scores an answer by a table of (text that the context contains, answer) -> log-likelihood.

    Every token of a trajectory gets `token_logprob`. Like the engine it refuses what is too long or has no context.
    """

    def __init__(
        self,
        renderer: Renderer,
        table: dict[tuple[str, str], float],
        token_logprob: float = 0.0,
        limit: int = 4096,
    ) -> None:
        self.renderer, self.table, self.token_logprob, self.limit = renderer, table, token_logprob, limit
        self.scored: list[ScoreRequest] = []
        self.score = _Method(self._score)
        self.token_logprobs = _Method(self._token_logprobs)

    def _check(self, requests: Sequence[ScoreRequest]) -> None:
        assert all(1 <= r.start <= len(r.token_ids) < self.limit for r in requests)

    def _score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        self._check(requests)
        self.scored += requests
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> float:
        context = self.renderer.decode(request.token_ids[: request.start].tolist())
        answer = self.renderer.decode(request.token_ids[request.start :].tolist())
        found = [
            v for (mark, gold), v in self.table.items() if mark in context and answer == f" {gold} </answer>"
        ]
        return found[0] if found else -20.0

    def _token_logprobs(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        self._check(requests)
        return [[self.token_logprob] * (len(r.token_ids) - r.start) for r in requests]


class Bench:
    """A weighting actor in the middle of an E-step."""

    def __init__(self, tokenizer: Any, path: Path, questions: Sequence[Question], **sections: Any) -> None:
        self.config = Config.model_validate({"em": {"questions_per_shard": 2}} | sections)
        self.actor = Weighting(self.config, "model")
        self.renderer = Renderer(tokenizer, self.config.agent)
        self.rollouts, self.weighted = path / "rollouts", path / "weighted"
        self.rollouts.mkdir(parents=True)
        self.weighted.mkdir()
        asyncio.run(self.actor.begin(list(questions), self.rollouts, self.weighted))

    def worker(self, table: dict[tuple[str, str], float] | None = None, **options: Any) -> FakeWorker:
        return FakeWorker(self.renderer, table or {}, limit=self.config.model.max_length, **options)

    def add(self, group: list[Trajectory], worker: Any) -> None:
        asyncio.run(self.actor.add(group, worker))

    def finish(self) -> dict[str, Any]:
        return asyncio.run(self.actor.finish())

    def examples(self) -> list[Example]:
        shards = sorted(self.weighted.glob("*.parquet"))
        return [example for shard in shards for example in examples_from_table(pq.read_table(shard))]

    def trajectories(self) -> list[Trajectory]:
        shards = sorted(self.rollouts.glob("*.parquet"))
        return [
            trajectory for shard in shards for trajectory in trajectories_from_table(pq.read_table(shard))
        ]

    def files(self) -> dict[str, bytes]:
        paths = [*self.rollouts.iterdir(), *self.weighted.iterdir()]
        return {str(path.relative_to(self.rollouts.parent)): path.read_bytes() for path in paths}

    def trajectory(
        self,
        question: Question = SILVER_HARP,
        sample: int = 0,
        *,
        mark: str = "",
        answer: str = "Orvane",
        stop_reason: StopReason = ANSWERED,
        logprob: float = -0.5,
        thinks: bool = True,
    ) -> Trajectory:
        """One search for `mark`, then an answer; without thinking the environment opens the answer at once."""
        encode = self.renderer.tokenizer
        pieces = [(self.renderer.prompt_ids(question.text), False)]
        if thinks:
            turn = f"<think> {mark} </think>", f"<record> {mark} </record> <answer>"
            pieces += [
                (encode(turn[0])["input_ids"], True),
                (encode("<search></search>")["input_ids"], False),
            ]
            pieces += [(encode(turn[1])["input_ids"], True)]
        else:
            pieces += [(encode("<answer>")["input_ids"], False)]
        answer_start = sum(len(ids) for ids, _ in pieces)
        if not stop_reason.is_infrastructure:
            pieces += [(encode(f" {answer} </answer>")["input_ids"], True)]
        mask = np.array([flag for ids, flag in pieces for _ in ids], dtype=np.bool_)
        return Trajectory(
            question_id=question.id,
            sample=sample,
            policy_version=0,
            token_ids=np.array([i for ids, _ in pieces for i in ids], dtype=np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, np.float32(logprob), np.float32(np.nan)),
            answer_start=answer_start,
            steps=(),
            answer=answer,
            stop_reason=stop_reason,
        )


@pytest.fixture
def bench(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("actors.weighting.load_tokenizer", lambda path: tokenizer)
    numbers = itertools.count()

    def make(questions: Sequence[Question] = (SILVER_HARP,), **sections: Any) -> Bench:
        return Bench(tokenizer, tmp_path / str(next(numbers)), questions, **sections)

    return make


def questions(number: int) -> list[Question]:
    return [Question(f"q{i}", f"Question number {i}?", (f"answer {i}",)) for i in range(number)]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "weighting",
    [
        {"method": "likelihood"},
        {"method": "posterior", "floor": 0.01},
        {"method": "length_normalised", "temperature": 2.0},
        {"method": "uniform"},
        {"method": "reward", "reward": "f1"},
        {"method": "reward", "reward": "em"},
        {"method": "likelihood", "max_weight": 0.3},
    ],
)
def test_weights_are_those_of_the_formulas(bench: Any, weighting: dict[str, Any]) -> None:
    question = Question("q1", "Who?", ("Mara Velin",))
    at = bench([question], weighting=weighting)
    group = [at.trajectory(question, 0, mark="good", answer="Mara"), at.trajectory(question, 1, mark="bad")]
    at.add(group, at.worker({("good", "Mara Velin"): -0.5, ("bad", "Mara Velin"): -4.0}))
    tokens = len(at.renderer.answer_ids("Mara Velin"))
    reward = {"f1": 2 / 3}.get(weighting.get("reward", "f1"), 0.0)
    scored = [Scored(-0.5, tokens, reward=reward), Scored(-4.0, tokens)]
    expected = importance_weights(scored, at.config.weighting)
    assert [example.weight for example in at.examples()] == pytest.approx(expected.tolist())


def test_of_several_gold_answers_the_most_likely_counts(bench: Any) -> None:
    at = bench()
    worker = at.worker(
        {
            ("first", "Mara Velin"): -3.0,
            ("first", "M. Velin"): -1.0,
            ("second", "Mara Velin"): -2.0,
            ("second", "M. Velin"): -2.5,
        }
    )
    at.add([at.trajectory(sample=0, mark="first"), at.trajectory(sample=1, mark="second")], worker)
    assert len(worker.scored) == 4
    first, second = at.examples()
    assert [first.weight, second.weight] == pytest.approx([math.exp(-1.0), math.exp(-2.0)])
    assert at.renderer.decode(first.token_ids.tolist()).endswith("<answer> M. Velin </answer>")
    assert at.renderer.decode(second.token_ids.tolist()).endswith("<answer> Mara Velin </answer>")


def test_the_gold_answer_stands_in_place_of_the_models_own_and_is_trained_on(bench: Any) -> None:
    at = bench()
    trajectory = at.trajectory(mark="which company", answer="somebody else entirely")
    worker = at.worker({("which company", "Mara Velin"): -1.0})
    at.add([trajectory], worker)
    (example,) = at.examples()
    start = trajectory.answer_start
    gold = at.renderer.answer_ids("Mara Velin")
    assert example.token_ids.tolist() == [*trajectory.token_ids[:start].tolist(), *gold]
    assert example.loss_mask.tolist() == [*trajectory.loss_mask[:start].tolist(), *[True] * len(gold)]
    assert (example.question_id, example.sample) == ("q1", 0)
    assert [r.start for r in worker.scored] == [start, start]
    assert worker.scored[0].token_ids.tolist() == example.token_ids.tolist()


def test_a_gold_answer_that_is_given_twice_is_scored_once(bench: Any) -> None:
    question = Question("q1", "Who?", ("Mara Velin", "Mara Velin"))
    at = bench([question])
    worker = at.worker()
    at.add([at.trajectory(question)], worker)
    assert len(worker.scored) == 1


# ---------------------------------------------------------------- what takes no part


def test_infrastructure_failures_are_excluded_and_counted_but_kept_to_read(bench: Any) -> None:
    at = bench(weighting="uniform")
    group = [
        at.trajectory(sample=0),
        at.trajectory(sample=1, stop_reason=FAILED),
        at.trajectory(sample=2, stop_reason=DIED),
        at.trajectory(sample=3, stop_reason=StopReason.MALFORMED),
    ]
    worker = at.worker()
    at.add(group, worker)
    assert [(e.sample, e.weight) for e in at.examples()] == [(0, 0.5), (3, 0.5)]
    assert [t.sample for t in at.trajectories()] == [0, 1, 2, 3]
    assert len(worker.scored) == 2 * len(SILVER_HARP.answers)
    report = at.finish()
    assert report["excluded"] == 2
    assert report["excluded_too_long_to_score"] == 0
    assert report["stop_reasons"] == {
        "answered": 1,
        "step_limit": 0,
        "length_limit": 0,
        "malformed": 1,
        "retriever_unavailable": 1,
        "engine_error": 1,
    }


def test_a_question_with_nothing_but_failures_has_no_say(bench: Any) -> None:
    first, second = questions(2)
    at = bench([first, second])
    worker = at.worker({("mark", "answer 1"): -1.0})
    at.add([at.trajectory(first, stop_reason=DIED)], worker)
    at.add([at.trajectory(second, mark="mark")], worker)
    report = at.finish()
    assert (report["questions"], report["excluded"]) == (1, 1)
    assert report["likelihood_bound"] == pytest.approx(-1.0)
    assert [e.question_id for e in at.examples()] == ["q1"]


def test_what_is_too_long_to_be_scored_is_excluded_and_counted(bench: Any) -> None:
    lengths = bench()
    short, long = lengths.trajectory(sample=0, mark="a"), lengths.trajectory(sample=1, mark="a " * 40)
    longest_gold = max(len(lengths.renderer.answer_ids(answer)) for answer in SILVER_HARP.answers)
    limit = short.answer_start + longest_gold + 1
    assert long.answer_start > limit
    at = bench(model={"max_length": limit}, weighting={"method": "uniform", "correct_proposal": True})
    worker = at.worker(token_logprob=-0.5)
    at.add([short, long], worker)
    assert [(e.sample, e.weight) for e in at.examples()] == [(0, 1.0)]
    report = at.finish()
    assert report["excluded"] == report["excluded_too_long_to_score"] == 1


def test_where_only_one_gold_answer_fits_that_one_counts(bench: Any) -> None:
    question = Question("q1", "Who?", ("Mara Velin of the old town by the river", "Mara"))
    trajectory = bench([question]).trajectory(question, mark="good")
    at = bench([question], model={"max_length": trajectory.answer_start + 12})
    worker = at.worker({("good", "Mara"): -0.25})
    at.add([trajectory], worker)
    (example,) = at.examples()
    assert example.weight == pytest.approx(math.exp(-0.25))
    assert len(worker.scored) == 1


# ---------------------------------------------------------------- the proposal's correction


@pytest.mark.parametrize(
    ("log_p", "log_q", "ratio"),
    [(-0.5, -0.5, lambda n: 1.0), (-0.6, -0.5, lambda n: math.exp(-0.1 * n)), (-0.5, -3.0, lambda n: 1.5)],
)
def test_the_clipped_ratio_of_the_sampled_tokens_corrects_the_weight(
    bench: Any, log_p: float, log_q: float, ratio: Any
) -> None:
    at = bench(weighting={"method": "likelihood", "correct_proposal": True, "max_ratio": 1.5})
    trajectory = at.trajectory(mark="good", logprob=log_q)
    sampled = int(trajectory.loss_mask[: trajectory.answer_start].sum())
    at.add([trajectory], at.worker({("good", "Mara Velin"): -1.0}, token_logprob=log_p))
    (example,) = at.examples()
    assert example.weight == pytest.approx(math.exp(-1.0) * ratio(sampled), rel=1e-5)


def test_without_correction_nothing_but_answers_is_scored(bench: Any) -> None:
    at = bench()
    worker = at.worker({("good", "Mara Velin"): -1.0})
    del worker.token_logprobs
    at.add([at.trajectory(mark="good", logprob=-9.0)], worker)
    assert at.examples()[0].weight == pytest.approx(math.exp(-1.0))


def test_a_trajectory_without_a_word_of_the_models_own_needs_no_correction(bench: Any) -> None:
    at = bench(weighting={"method": "uniform", "correct_proposal": True})
    group = [at.trajectory(sample=0, thinks=False), at.trajectory(sample=1, mark="good", logprob=-0.5)]
    at.add(group, at.worker(token_logprob=-1.0))
    silent, spoken = at.examples()
    assert silent.weight == 0.5
    assert spoken.weight < 0.5


# ---------------------------------------------------------------- shards


def group_of(at: Bench, question: Question) -> list[Trajectory]:
    return [at.trajectory(question, sample, mark=f"{question.id} {sample}") for sample in range(2)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_shards_do_not_depend_on_the_order_in_which_questions_finish(
    bench: Any, order: tuple[int, ...]
) -> None:
    asked = questions(5)
    expected, at = bench(asked), bench(asked)
    table = {(f"q{i} {k}", f"answer {i}"): -float(i + k) for i in range(5) for k in range(2)}
    for question in asked:
        expected.add(group_of(expected, question), expected.worker(table))
    for index in order:
        at.add(group_of(at, asked[index]), at.worker(table))
    assert at.files() == expected.files()
    assert at.finish() == expected.finish()
    assert sorted(at.files()) == [
        f"{kind}/00000{n}.parquet" for kind in ("rollouts", "weighted") for n in range(3)
    ]
    assert [e.question_id for e in at.examples()] == [q.id for q in asked for _ in range(2)]


def test_a_shard_is_written_as_soon_as_its_last_question_is_in(bench: Any) -> None:
    asked = questions(4)
    at = bench(asked)
    seen = []
    for index in (3, 0, 1, 2):
        at.add(group_of(at, asked[index]), at.worker())
        seen.append(sorted(path.name for path in at.weighted.iterdir()))
    assert seen == [[], [], ["000000.parquet"], ["000000.parquet", "000001.parquet"]]


def test_questions_that_are_weighted_at_the_same_time_do_not_mix(bench: Any) -> None:
    asked = questions(4)
    at, one_by_one = bench(asked), bench(asked)
    table = {(f"q{i} {k}", f"answer {i}"): -float(i + k) for i in range(4) for k in range(2)}

    class Slow(FakeWorker):
        def __init__(self, delay: int) -> None:
            super().__init__(at.renderer, table)
            self.delay, fake = delay, self.score

            async def later(requests: Sequence[ScoreRequest]) -> list[float]:
                for _ in range(delay):
                    await asyncio.sleep(0)
                scores: list[float] = await fake.remote(requests)
                return scores

            self.score = type("Slowly", (), {"remote": staticmethod(later)})()  # type: ignore[assignment]

    async def all_at_once() -> None:
        groups = [(group_of(at, question), Slow(10 - 3 * i)) for i, question in enumerate(asked)]
        await asyncio.gather(*(at.actor.add(group, worker) for group, worker in groups))

    asyncio.run(all_at_once())
    for question in asked:
        one_by_one.add(group_of(one_by_one, question), one_by_one.worker(table))
    assert at.files() == one_by_one.files()
    assert at.finish() == one_by_one.finish()


def test_nothing_of_an_earlier_e_step_is_left_in_the_next(bench: Any, tmp_path: Path) -> None:
    asked = questions(2)
    at = bench(asked)
    at.add(group_of(at, asked[0]), at.worker())
    for name in ("rollouts", "weighted"):
        (tmp_path / name).mkdir()
    asyncio.run(at.actor.begin(asked[1:], tmp_path / "rollouts", tmp_path / "weighted"))
    at.add(group_of(at, asked[1]), at.worker())
    assert at.finish()["questions"] == 1
    assert at.files() == {}
    (shard,) = (tmp_path / "weighted").iterdir()
    assert {e.question_id for e in examples_from_table(pq.read_table(shard))} == {"q1"}


# ---------------------------------------------------------------- failures


def test_a_worker_that_dies_while_it_scores_leaves_nothing_behind(bench: Any) -> None:
    asked = questions(2)
    at, expected = bench(asked), bench(asked)

    class Dying:
        def __init__(self) -> None:
            self.score = self.token_logprobs = _Method(self._die)

        def _die(self, requests: Sequence[ScoreRequest]) -> list[float]:
            raise ConnectionError("the worker died")

    at.add(group_of(at, asked[0]), at.worker())
    with pytest.raises(ConnectionError):
        at.add(group_of(at, asked[1]), Dying())
    assert at.files() == {}
    with pytest.raises(RuntimeError, match="1 of 2 questions are missing"):
        at.finish()
    at.add(group_of(at, asked[1]), at.worker())
    for question in asked:
        expected.add(group_of(expected, question), expected.worker())
    assert at.files() == expected.files()
    assert at.finish() == expected.finish()


def test_scores_of_the_wrong_number_leave_nothing_behind(bench: Any) -> None:
    at = bench()
    worker = at.worker()
    worker.score = _Method(lambda requests: [-1.0] * (len(requests) - 1))
    with pytest.raises(ValueError, match="zip"):
        at.add([at.trajectory()], worker)
    with pytest.raises(RuntimeError, match="1 of 1"):
        at.finish()


def test_an_incomplete_e_step_is_not_finished(bench: Any) -> None:
    at = bench(questions(3))
    with pytest.raises(RuntimeError, match="not complete: 3 of 3 questions are missing"):
        at.finish()


def test_an_e_step_in_which_nothing_could_be_weighted_is_an_error(bench: Any) -> None:
    at = bench()
    at.add([at.trajectory(stop_reason=FAILED)], at.worker())
    with pytest.raises(RuntimeError, match="no trajectory of the E-step could be weighted"):
        at.finish()


# ---------------------------------------------------------------- statistics


def test_the_statistics_are_those_of_the_formulas(bench: Any) -> None:
    asked = questions(2)
    at = bench(asked)
    table = {(f"q{i} {k}", f"answer {i}"): -1.0 - i - k for i in range(2) for k in range(2)}
    right = at.trajectory(asked[0], 0, mark="q0 0", answer="Answer 0")
    at.add([right, at.trajectory(asked[0], 1, mark="q0 1")], at.worker(table))
    at.add(group_of(at, asked[1]), at.worker(table))
    tokens = len(at.renderer.answer_ids("answer 0"))
    groups = [
        [Scored(-1.0, tokens, correct=True), Scored(-2.0, tokens)],
        [Scored(-2.0, tokens), Scored(-3.0, tokens)],
    ]
    expected = summarise(groups, [importance_weights(group, at.config.weighting) for group in groups])
    report = at.finish()
    for name in (
        "questions",
        "likelihood_bound",
        "likelihood_bound_stderr",
        "effective_sample_size",
        "mean_weight",
    ):
        assert report[name] == pytest.approx(getattr(expected, name)), name
    assert report["all_failed_share"] == 50.0
    assert report["excluded"] == 0
