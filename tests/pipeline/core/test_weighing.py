"""ExSearch's weights from the episodes of a question: what counts, what is left out, and the figures of a phase."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import AgentConfig, WeightingConfig
from pipeline.core.records import Episode, Example, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.run import write_json
from pipeline.core.weighing import SearchWeights, log_ratio, summarise_scored
from pipeline.core.weighting import Scored, importance_weights, summarise

SILVER_HARP = Question("q1", "Who founded the maker of the Silver Harp?", ("Mara Velin", "M. Velin"))
ANSWERED, FAILED, DIED = StopReason.ANSWERED, StopReason.RETRIEVER_UNAVAILABLE, StopReason.ENGINE_ERROR
NAN = float("nan")


class Bench:
    """Weights of one configuration."""

    def __init__(self, tokenizer: Any, side_car: Path, **weighting: Any) -> None:
        self.side_car = side_car
        self.weighting = WeightingConfig(**weighting)
        self.renderer = Renderer(tokenizer, AgentConfig())
        self.weigh = SearchWeights(self.weighting, AgentConfig(), "model")

    def trajectory(
        self,
        *likelihoods: float,
        sample: int = 0,
        answer: str = "Orvane",
        stop_reason: StopReason = ANSWERED,
        **changes: Any,
    ) -> Trajectory:
        """One thought, then an answer."""
        encode = self.renderer.tokenizer
        pieces = [
            (self.renderer.prompt_ids(SILVER_HARP.text), False),
            (encode("<think> which </think> <answer>")["input_ids"], True),
        ]
        start = sum(len(ids) for ids, _ in pieces)
        pieces.append((encode(f" {answer} </answer>")["input_ids"], True))
        mask = np.array([flag for ids, flag in pieces for _ in ids], dtype=np.bool_)
        ids = np.array([i for ids, _ in pieces for i in ids], dtype=np.int32)
        logprobs = np.where(mask, np.float32(-0.5), np.float32(np.nan))
        fields = {"token_ids": ids, "loss_mask": mask, "logprobs": logprobs, "answer_start": start} | changes
        return Trajectory(
            question_id="q1",
            sample=sample,
            policy_version=0,
            steps=(),
            answer=answer,
            stop_reason=stop_reason,
            log_likelihoods=likelihoods,
            **fields,
        )

    def __call__(
        self, group: Sequence[Trajectory], question: Question = SILVER_HARP
    ) -> tuple[list[Example], dict[str, Any]]:
        weighted = self.weigh(question, [Episode("q1", t.sample, (t,)) for t in group])
        write_json(self.side_car, weighted.statistics)
        return list(weighted.examples["searcher"]), json.loads(self.side_car.read_text())


@pytest.fixture
def bench(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("pipeline.core.weighing.renderer_at", lambda path, agent: Renderer(tokenizer, agent))
    return lambda **weighting: Bench(tokenizer, tmp_path / "side-car.json", **weighting)


def weights(examples: Sequence[Example]) -> list[float]:
    return [example.number("weight") for example in examples]


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
    at, question = bench(**weighting), Question("q1", "Who?", ("Mara Velin",))
    examples, _ = at([at.trajectory(-0.5, answer="Mara"), at.trajectory(-4.0, sample=1)], question)
    tokens = len(at.renderer.answer_ids("Mara Velin"))
    reward = {"f1": 2 / 3}.get(weighting.get("reward", "f1"), 0.0)
    scored = [Scored(-0.5, tokens, reward=reward), Scored(-4.0, tokens)]
    assert weights(examples) == pytest.approx(importance_weights(scored, at.weighting).tolist())


def test_the_protocol_says_which_answers_are_right_and_what_they_earn(bench: Any) -> None:
    at, question = bench(method="reward", reward="em"), Question("q1", "When?", ("1914-1918",))
    group = [at.trajectory(-0.5, answer="1914\u20131918")]
    examples, row = at(group, question)
    assert (weights(examples), row["scored"][0]["correct"]) == ([1.0], True)
    at.weigh = replace(at.weigh, protocol="kilt")
    examples, row = at(group, question)
    assert (weights(examples), row["scored"][0]["correct"]) == ([0.0], False)


def test_of_several_gold_answers_the_most_likely_counts_and_stands_in_place_of_the_models_own(
    bench: Any,
) -> None:
    at = bench()
    group = [at.trajectory(-3.0, -1.0, answer="somebody else"), at.trajectory(-2.0, -2.5, sample=1)]
    (first, second), _ = at(group)
    assert weights([first, second]) == pytest.approx([math.exp(-1.0), math.exp(-2.0)])
    for example, trajectory, gold in ((first, group[0], "M. Velin"), (second, group[1], "Mara Velin")):
        start, ids = trajectory.answer_start, at.renderer.answer_ids(gold)
        assert example.token_ids.tolist() == [*trajectory.token_ids[:start].tolist(), *ids]
        assert example.loss_mask.tolist() == [*trajectory.loss_mask[:start].tolist(), *[True] * len(ids)]
    assert (first.id, first.unit, first.role) == ("q1/0", "q1/0", "searcher")


def test_infrastructure_failures_are_excluded_and_counted(bench: Any) -> None:
    at = bench(method="uniform")
    examples, row = at(
        [
            at.trajectory(-1.0, -1.0),
            at.trajectory(sample=1, stop_reason=FAILED),
            at.trajectory(sample=2, stop_reason=DIED),
            at.trajectory(-2.0, -2.0, sample=3, stop_reason=StopReason.MALFORMED),
            at.trajectory(sample=4, stop_reason=StopReason.RETRIEVER_BAD_ANSWER),
        ]
    )
    assert [(e.id, w) for e, w in zip(examples, weights(examples), strict=True)] == [
        ("q1/0", 0.5),
        ("q1/3", 0.5),
    ]
    report = summarise_scored([row])
    assert (report["excluded"], report["excluded_too_long_to_score"]) == (3, 0)
    assert report["stop_reasons"]["retriever_bad_answer"] == 1
    assert report["stop_reasons"]["retriever_unavailable"] == report["stop_reasons"]["engine_error"] == 1


def test_what_is_too_long_to_be_scored_is_excluded_and_counted(bench: Any) -> None:
    at = bench(method="uniform")
    examples, row = at([at.trajectory(-1.0, -1.0), at.trajectory(NAN, NAN, sample=1)])
    assert weights(examples) == [1.0]
    report = summarise_scored([row])
    assert report["excluded"] == report["excluded_too_long_to_score"] == 1


def test_where_only_one_gold_answer_fits_that_one_counts(bench: Any) -> None:
    at = bench()
    (example,), _ = at([at.trajectory(NAN, -0.25)])
    assert weights([example]) == pytest.approx([math.exp(-0.25)])
    assert at.renderer.decode(example.token_ids.tolist()).endswith("M. Velin </answer>")


def test_likelihoods_of_another_number_of_answers_are_refused(bench: Any) -> None:
    at = bench()
    with pytest.raises(ValueError, match="zip"):
        at([at.trajectory(-1.0)])


def test_an_impossible_answer_weighs_nothing_also_through_a_file(bench: Any) -> None:
    at = bench()
    examples, row = at([at.trajectory(-1.0, -2.0), at.trajectory(-math.inf, -math.inf, sample=1)])
    assert weights(examples) == pytest.approx([math.exp(-1.0), 0.0])
    assert summarise_scored([row])["likelihood_bound"] == pytest.approx(-1.0 - math.log(2))


def test_a_question_with_nothing_but_failures_has_no_say(bench: Any) -> None:
    at = bench()
    nothing, failed = at([at.trajectory(stop_reason=DIED)])
    _, other = at([at.trajectory(-1.0, -3.0)])
    assert nothing == []
    report = summarise_scored([failed, other])
    assert (report["questions"], report["excluded"]) == (1, 1)
    assert report["likelihood_bound"] == pytest.approx(-1.0)


def test_a_phase_in_which_nothing_could_be_weighted_is_an_error(bench: Any) -> None:
    at = bench()
    _, row = at([at.trajectory(stop_reason=FAILED)])
    with pytest.raises(
        RuntimeError, match=r"no trajectory could be weighted; how they stopped: .*unavailable': 1"
    ):
        summarise_scored([row])


# ---------------------------------------------------------------- the proposal's correction


@pytest.mark.parametrize(("log_q", "clips"), [(-0.5, False), (-0.4, False), (-3.0, True)])
def test_the_clipped_ratio_of_the_sampled_tokens_corrects_the_weight(
    bench: Any, log_q: float, clips: bool
) -> None:
    at = bench(method="likelihood", correct_proposal=True, max_ratio=1.5)
    plain = at.trajectory(-1.0, -9.0)
    proposal = np.where(plain.loss_mask, np.float32(log_q), np.float32(np.nan))
    trajectory = at.trajectory(-1.0, -9.0, proposal_logprobs=proposal)
    sampled = int(trajectory.loss_mask[: trajectory.answer_start].sum())
    (example,), _ = at([trajectory])
    ratio = 1.5 if clips else math.exp((-0.5 - log_q) * sampled)
    assert weights([example]) == pytest.approx([math.exp(-1.0) * ratio], rel=1e-5)


def test_without_a_recorded_proposal_or_correction_the_ratio_is_one(bench: Any) -> None:
    at = bench()
    assert log_ratio(at.trajectory(-1.0, -1.0)) == 0.0
    other = np.full(len(at.trajectory().token_ids), -9.0, dtype=np.float32)
    (example,), _ = at([at.trajectory(-1.0, -2.0, proposal_logprobs=other)])
    assert weights([example]) == pytest.approx([math.exp(-1.0)])


def test_a_trajectory_without_a_word_of_the_models_own_needs_no_correction(bench: Any) -> None:
    at = bench(method="uniform", correct_proposal=True)
    spoken = at.trajectory(-1.0, -1.0, sample=1)
    other = np.where(spoken.loss_mask, np.float32(-0.1), np.float32(np.nan))
    mask = spoken.loss_mask.copy()
    mask[: spoken.answer_start] = False
    silent = at.trajectory(-1.0, -1.0, loss_mask=mask, proposal_logprobs=other)
    examples, _ = at([silent, replace(spoken, proposal_logprobs=other)])
    assert weights(examples)[0] == 0.5
    assert weights(examples)[1] < 0.5


# ---------------------------------------------------------------- statistics


def test_the_statistics_are_those_of_the_formulas_also_through_a_file(bench: Any) -> None:
    at, question = bench(), Question("q1", "Who?", ("answer 0",))
    right = at.trajectory(-1.0, answer="Answer 0")
    rows = [
        at([right, at.trajectory(-2.0, sample=1)], question)[1],
        at([at.trajectory(-2.0), at.trajectory(-3.0, sample=1)], question)[1],
    ]
    tokens = len(at.renderer.answer_ids("answer 0"))
    groups = [
        [Scored(-1.0, tokens, correct=True), Scored(-2.0, tokens)],
        [Scored(-2.0, tokens), Scored(-3.0, tokens)],
    ]
    expected = summarise(groups, [importance_weights(group, at.weighting) for group in groups])
    report = summarise_scored(rows)
    for name in (
        "questions",
        "likelihood_bound",
        "likelihood_bound_stderr",
        "effective_sample_size",
        "mean_weight",
    ):
        assert report[name] == getattr(expected, name), name
    assert report["all_failed_share"] == 50.0
    assert report["excluded"] == 0
