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
from tokenizers import normalizers

from pipeline.core.config import AgentConfig, WeightingConfig
from pipeline.core.copies import copies_of
from pipeline.core.records import Episode, Example, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.run import write_json
from pipeline.core.weighing import SearchWeights, log_ratio
from pipeline.core.weighting import Gold, Scored, log_weights, summarise

SILVER_HARP = Question("q1", "Who founded the maker of the Silver Harp?", ("Mara Velin", "M. Velin"))
ANSWERED, FAILED, DIED = StopReason.ANSWERED, StopReason.RETRIEVER_UNAVAILABLE, StopReason.ENGINE_ERROR
NAN = float("nan")


class Bench:
    """Weights of one configuration."""

    def __init__(self, tokenizer: Any, side_car: Path, **weighting: Any) -> None:
        self.side_car = side_car
        # Trajectories here are copies of each other; whether these are merged is looked at on its own.
        self.weighting = WeightingConfig(**{"merge_copies": False} | weighting)
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
            **{"log_likelihoods": likelihoods} | fields,
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
    return [math.exp(example.number("log_weight")) for example in examples]


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
    scored = [Scored.of([Gold(-0.5, tokens)], reward=reward), Scored.of([Gold(-4.0, tokens)])]
    assert weights(examples) == pytest.approx(np.exp(log_weights(scored, at.weighting)).tolist())


def test_the_protocol_says_which_answers_are_right_and_what_they_earn(bench: Any) -> None:
    at, question = bench(method="reward", reward="em"), Question("q1", "When?", ("1914-1918",))
    group = [at.trajectory(-0.5, answer="1914\u20131918")]
    examples, row = at(group, question)
    assert (weights(examples), row["scored"][0]["correct"]) == ([1.0], True)
    at.weigh = replace(at.weigh, protocol="kilt")
    examples, row = at(group, question)
    assert (weights(examples), row["scored"][0]["correct"]) == ([0.0], False)


def test_gold_answers_count_together_and_the_most_likely_stands_in_place_of_the_models_own(
    bench: Any,
) -> None:
    at = bench()
    group = [at.trajectory(-3.0, -1.0, answer="somebody else"), at.trajectory(-2.0, -2.5, sample=1)]
    (first, second), _ = at(group)
    assert weights([first, second]) == pytest.approx(
        [math.exp(-3.0) + math.exp(-1.0), math.exp(-2.0) + math.exp(-2.5)]
    )
    for example, trajectory, gold in ((first, group[0], "M. Velin"), (second, group[1], "Mara Velin")):
        start, ids = trajectory.answer_start, at.renderer.answer_ids(gold)
        assert example.token_ids.tolist() == [*trajectory.token_ids[:start].tolist(), *ids]
        assert example.loss_mask.tolist() == [*trajectory.loss_mask[:start].tolist(), *[True] * len(ids)]
    assert (first.id, first.unit, first.role) == ("q1/0", "q1", "searcher")


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
    report = at.weigh.summarise([row])
    assert (report["excluded"], report["excluded_too_long_to_score"]) == (3, 0)
    assert report["stop_reasons"]["retriever_bad_answer"] == 1
    assert report["stop_reasons"]["retriever_unavailable"] == report["stop_reasons"]["engine_error"] == 1


def test_what_is_too_long_to_be_scored_is_excluded_and_counted(bench: Any) -> None:
    at = bench(method="uniform")
    examples, row = at([at.trajectory(-1.0, -1.0), at.trajectory(NAN, NAN, sample=1)])
    assert weights(examples) == [1.0]
    report = at.weigh.summarise([row])
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
    assert weights(examples) == pytest.approx([math.exp(-1.0) + math.exp(-2.0), 0.0])
    expected = math.log((math.exp(-1.0) + math.exp(-2.0)) / 2)
    assert at.weigh.summarise([row])["likelihood_bound"] == pytest.approx(expected)


def test_a_question_with_nothing_but_failures_has_no_say(bench: Any) -> None:
    at = bench()
    nothing, failed = at([at.trajectory(stop_reason=DIED)])
    _, other = at([at.trajectory(-1.0, -3.0)])
    assert nothing == []
    report = at.weigh.summarise([failed, other])
    assert (report["questions"], report["excluded"]) == (1, 1)
    assert report["likelihood_bound"] == pytest.approx(math.log(math.exp(-1.0) + math.exp(-3.0)))


def test_a_phase_in_which_nothing_could_be_weighted_is_an_error(bench: Any) -> None:
    at = bench()
    _, row = at([at.trajectory(stop_reason=FAILED)])
    with pytest.raises(
        RuntimeError, match=r"no trajectory could be weighted; how they stopped: .*unavailable': 1"
    ):
        at.weigh.summarise([row])


def test_forms_of_an_answer_that_the_tokenizer_makes_one_of_count_once(bench: Any) -> None:
    at, question = bench(), Question("q1", "Who?", ("Mara Velin", "Mara  Velin"))
    at.renderer.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("  ", " ")
    (example,), _ = at([at.trajectory(-1.0, -1.0)], question)
    assert weights([example]) == pytest.approx([math.exp(-1.0)])


@pytest.mark.parametrize(
    ("weighting", "has_weights"),
    [
        ({"method": "posterior"}, False),
        ({"method": "length_normalised", "self_normalised": True}, False),
        ({"method": "posterior", "floor": 0.1}, True),
        ({"method": "likelihood"}, True),
        ({"method": "uniform"}, True),
    ],
)
def test_the_last_trajectory_of_a_question_has_no_weight_where_weights_compare(
    bench: Any, weighting: dict[str, Any], has_weights: bool
) -> None:
    at = bench(**weighting)
    alone, row = at([at.trajectory(-40.0, -41.0), at.trajectory(sample=1, stop_reason=FAILED)])
    _, other = at([at.trajectory(-1.0, -1.0), at.trajectory(-2.0, -2.0, sample=1)])
    assert len(alone) == has_weights
    report = at.weigh.summarise([row, other])
    assert report["excluded_nothing_to_compare"] == (not has_weights)
    assert report["excluded"] == 1 + (not has_weights)
    assert report["questions"] == 2
    if not has_weights:
        with pytest.raises(RuntimeError, match="1 were the only usable one of their question"):
            at.weigh.summarise([row])


def test_a_reward_trains_the_trajectory_with_its_own_answer(bench: Any) -> None:
    at = bench(method="reward", reward="f1")
    own = at.trajectory(-1.0, -9.0, answer="Mara")
    (example,), _ = at([own])
    assert weights([example]) == pytest.approx([2 / 3])
    assert example.token_ids.tolist() == own.token_ids.tolist()
    assert example.loss_mask.tolist() == own.loss_mask.tolist()


@pytest.mark.parametrize("method", ["likelihood", "uniform"])
def test_other_weights_train_the_gold_answer(bench: Any, method: str) -> None:
    at = bench(method=method)
    (example,), _ = at([at.trajectory(-1.0, -9.0, answer="Mara")])
    assert at.renderer.decode(example.token_ids.tolist()).endswith("<answer> Mara Velin </answer>")


# ---------------------------------------------------------------- the proposal's correction


def test_of_a_reward_the_ratio_is_over_the_models_own_answer_too(bench: Any) -> None:
    sampled = {}
    for method in ("reward", "uniform"):
        at = bench(method=method, correct_proposal=True, max_ratio=1e9)
        plain = at.trajectory(-1.0, -9.0, answer="Mara Velin")
        proposal = np.where(plain.loss_mask, np.float32(-0.6), np.float32(np.nan))
        (example,), _ = at([replace(plain, proposal_logprobs=proposal)])
        sampled[method] = example.number("log_weight") / 0.1
    start = plain.answer_start
    assert sampled["uniform"] == pytest.approx(plain.loss_mask[:start].sum(), rel=1e-5)
    assert sampled["reward"] == pytest.approx(plain.loss_mask.sum(), rel=1e-5)


def test_the_ratio_is_also_over_what_was_sampled_and_is_not_trained(bench: Any) -> None:
    at = bench(method="uniform", correct_proposal=True, max_ratio=1e9)
    plain = at.trajectory(-1.0, -9.0)
    proposal = np.where(plain.loss_mask, np.float32(-0.6), np.float32(np.nan))
    refused = replace(plain, proposal_logprobs=proposal, loss_mask=np.zeros_like(plain.loss_mask))
    (first,), _ = at([replace(plain, proposal_logprobs=proposal)])
    (second,), _ = at([refused])
    assert first.number("log_weight") == second.number("log_weight") > 0


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
    likelihood = math.exp(-1.0) + math.exp(-9.0)
    assert weights([example]) == pytest.approx([likelihood * ratio], rel=1e-5)


def test_without_a_recorded_proposal_or_correction_the_ratio_is_one(bench: Any) -> None:
    at = bench()
    assert log_ratio(at.trajectory(-1.0, -1.0), with_answer=True) == 0.0
    other = np.full(len(at.trajectory().token_ids), -9.0, dtype=np.float32)
    (example,), _ = at([at.trajectory(-1.0, -2.0, proposal_logprobs=other)])
    assert weights([example]) == pytest.approx([math.exp(-1.0) + math.exp(-2.0)])


def test_a_trajectory_without_a_word_of_the_models_own_needs_no_correction(bench: Any) -> None:
    at = bench(method="uniform", correct_proposal=True)
    spoken = at.trajectory(-1.0, -1.0, sample=1)
    other = np.where(spoken.loss_mask, np.float32(-0.1), np.float32(np.nan))
    mask = spoken.loss_mask.copy()
    mask[: spoken.answer_start] = False
    logprobs = np.where(mask, spoken.logprobs, np.float32(np.nan))
    silent = at.trajectory(-1.0, -1.0, loss_mask=mask, logprobs=logprobs, proposal_logprobs=other)
    examples, _ = at([silent, replace(spoken, proposal_logprobs=other)])
    assert weights(examples)[0] == 0.5
    assert weights(examples)[1] < 0.5


# ---------------------------------------------------------------- copies


def test_trajectories_that_went_the_same_way_are_trained_once_and_counted(bench: Any) -> None:
    at, question = bench(merge_copies=True), Question("q1", "Who?", ("Mara Velin",))
    # What the model answered differs, but the gold answer stands in its place.
    group = [
        at.trajectory(-1.0, answer="Orvane"),
        at.trajectory(-1.0, answer="Mara", sample=1),
        at.trajectory(-2.0, sample=2, loss_mask=at.trajectory().loss_mask & False),
    ]
    examples, row = at(group, question)
    assert [e.id for e in examples] == ["q1/0", "q1/2"]
    assert weights(examples) == pytest.approx([2 * math.exp(-1.0), math.exp(-2.0)])
    assert [copies_of(example) for example in examples] == [2, 1]
    apart = bench(merge_copies=False)
    _, row_apart = apart(group, question)
    report, expected = at.weigh.summarise([row]), apart.weigh.summarise([row_apart])
    assert report["merged_copies"] == 1
    assert report == expected | {"merged_copies": 1}


# ---------------------------------------------------------------- turn-wise weights


def with_two_turns(at: Bench, **fields: Any) -> Trajectory:
    """Two turns, with a passage between them, and an answer in the second."""
    pieces = [
        (at.renderer.prompt_ids(SILVER_HARP.text), False),
        (at.renderer.tokenizer("<think> which </think>")["input_ids"], True),
        (at.renderer.trusted_ids("<search> Orvane </search>"), False),
        (at.renderer.tokenizer("<record> it </record> <answer>")["input_ids"], True),
    ]
    start = sum(len(ids) for ids, _ in pieces)
    pieces.append((at.renderer.tokenizer(" Orvane </answer>")["input_ids"], True))
    mask = np.array([flag for ids, flag in pieces for _ in ids], dtype=np.bool_)
    return at.trajectory(
        token_ids=np.array([i for ids, _ in pieces for i in ids], dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, np.float32(-0.5), np.float32(np.nan)),
        answer_start=start,
        **fields,
    )


def test_each_token_weighs_what_its_turn_is_credited_with_and_the_answer_what_the_trajectory_weighs(
    bench: Any,
) -> None:
    at, question = bench(credit="turn", credit_decay=0.0), Question("q1", "Who?", ("Mara Velin",))
    trajectory = with_two_turns(
        at, log_likelihoods=(math.log(0.9),), turn_log_likelihoods=(math.log(0.2), math.log(0.5))
    )
    assert at.renderer.decode(trajectory.token_ids[trajectory.turn_starts[1] :].tolist()).startswith(
        "<record>"
    )
    (example,), row = at([trajectory], question)
    found = weights([example])[0] * example.streams["credit"]
    start, (first, second) = trajectory.answer_start, trajectory.turn_starts
    expected = np.full(example.length, 0.9)
    expected[first:second], expected[second:start] = 0.3, 0.4
    assert found[example.loss_mask] == pytest.approx(expected[example.loss_mask])
    assert example.streams["credit"][example.loss_mask].mean() == pytest.approx(1.0)
    report = at.weigh.summarise([row])
    assert (report["turns"], report["turns_without_credit"]) == (2, 0)


def test_a_turn_that_loses_weighs_nothing_and_is_counted(bench: Any) -> None:
    at, question = bench(credit="turn"), Question("q1", "Who?", ("Mara Velin",))
    trajectory = with_two_turns(
        at, log_likelihoods=(math.log(0.4),), turn_log_likelihoods=(math.log(0.2), math.log(0.5))
    )
    (example,), row = at([trajectory], question)
    second = slice(trajectory.turn_starts[1], trajectory.answer_start)
    assert not example.streams["credit"][second].any()
    assert at.weigh.summarise([row])["turns_without_credit"] == 1


def test_a_trajectory_of_no_weight_at_all_has_no_weight_of_a_token(bench: Any) -> None:
    at = bench(credit="turn")
    impossible = with_two_turns(
        at, log_likelihoods=(-math.inf, -math.inf), turn_log_likelihoods=(-math.inf, -math.inf)
    )
    (example,), row = at([impossible])
    assert weights([example]) == [0.0]
    assert np.isfinite(example.streams["credit"]).all()
    assert at.weigh.summarise([row])["turns_without_credit"] == 2


def test_a_trajectory_that_never_began_a_turn_trains_its_answer(bench: Any) -> None:
    at, question = bench(credit="turn"), Question("q1", "Who?", ("Mara Velin",))
    plain = at.trajectory(math.log(0.5))
    silent = np.arange(len(plain.token_ids)) >= plain.answer_start
    cut = replace(
        plain,
        loss_mask=plain.loss_mask & silent,
        logprobs=np.where(silent, plain.logprobs, np.float32(np.nan)),
    )
    (example,), _ = at([cut], question)
    assert weights([example]) == pytest.approx([0.5])
    assert example.streams["credit"][example.loss_mask] == pytest.approx(1.0)


# ---------------------------------------------------------------- hints


def test_what_a_hinted_trajectory_answers_says_nothing_of_the_model_and_its_share_is_reported(
    bench: Any,
) -> None:
    at, question = bench(correct_proposal=True), Question("q1", "Who?", ("Mara Velin",))
    at.weigh = replace(at.weigh, hinted=1)
    plain = at.trajectory(-1.0, answer="Mara Velin")
    own = int(plain.loss_mask[: plain.answer_start].sum())
    proposal = np.where(plain.loss_mask, np.float32(-0.5 + 0.7 / own), np.float32(np.nan))
    examples, row = at([replace(plain, proposal_logprobs=proposal), at.trajectory(-2.0, sample=1)], question)
    hinted, other = math.exp(-1.0 - 0.7), math.exp(-2.0)
    assert weights(examples) == pytest.approx([hinted, other], rel=1e-4)
    report = at.weigh.summarise([row])
    assert report["all_failed_share"] == 100.0
    assert report["hinted"] == 1
    assert report["hinted_weight_share"] == pytest.approx(100 * hinted / (hinted + other), rel=1e-4)


# ---------------------------------------------------------------- further samples


def test_further_samples_are_weighed_down_counted_and_left_out_of_the_bound(bench: Any) -> None:
    at, question = bench(), Question("q1", "Who?", ("Mara Velin",))
    at.weigh = replace(at.weigh, usual=2)
    likelihoods = [0.1, 0.1, 0.8, 0.4]
    four = [at.trajectory(math.log(p), sample=k, answer=f"no {k}") for k, p in enumerate(likelihoods)]
    examples, more = at(four, question)
    assert weights(examples) == pytest.approx([0.05, 0.05, 0.4, 0.2])
    _, with_a_failure = at([replace(four[0], stop_reason=StopReason.ENGINE_ERROR), *four[1:]], question)
    assert at.weigh.summarise([with_a_failure])["mean_likelihood"] == pytest.approx(0.1)
    _, few = at(four[:2], Question("q2", "Who?", ("Mara Velin",)))
    report = at.weigh.summarise([more, few])
    assert report["further"] == 2
    assert report["mean_likelihood"] == pytest.approx(0.1)
    assert "further" not in replace(at.weigh, usual=None).summarise([few])


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
        [Scored.of([Gold(-1.0, tokens)], correct=True), Scored.of([Gold(-2.0, tokens)])],
        [Scored.of([Gold(-2.0, tokens)]), Scored.of([Gold(-3.0, tokens)])],
    ]
    logs = [log_weights(group, at.weighting) for group in groups]
    expected = summarise(groups, logs, at.weighting)
    report = at.weigh.summarise(rows)
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
