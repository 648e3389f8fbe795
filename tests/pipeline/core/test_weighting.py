"""The E-step's arithmetic: what defines each weighting; defects of other implementations as cases."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.core.config import WeightingConfig
from pipeline.core.weighting import (
    Gold,
    Scored,
    bound_of,
    effective_sample_size,
    log_weights,
    summarise,
    trained_gold,
)
from tests.pipeline.weights_support import one

METHODS = ("likelihood", "posterior", "length_normalised", "reward", "uniform")
log_likelihoods = st.lists(st.floats(-500, 0), min_size=1, max_size=8)


def weights_of(scored: Sequence[Scored], config: WeightingConfig) -> np.ndarray:
    return np.exp(log_weights(scored, config))


def weights(values: Sequence[float], *, num_tokens: int = 3, **config: object) -> np.ndarray:
    return weights_of([one(value, num_tokens) for value in values], WeightingConfig.model_validate(config))


def test_likelihood_weights_are_the_probabilities_of_the_gold_answer() -> None:
    assert weights([math.log(0.5), math.log(0.125)], method="likelihood") == pytest.approx([0.5, 0.125])


def test_the_better_of_two_trajectories_gets_the_softmax_share_and_not_the_rest() -> None:
    # Defect in the wild: weights NLL_i / sum NLL would give 0.048 to the better and 0.952 to the worse one.
    assert weights([-0.1, -2.0], method="posterior") == pytest.approx([0.870, 0.130], abs=5e-4)


def test_length_normalised_weights_are_geometric_mean_token_probabilities() -> None:
    assert weights([-6.0, -3.0], num_tokens=3, method="length_normalised") == pytest.approx(
        [math.exp(-2), math.exp(-1)]
    )
    normalised = weights([-6.0, -3.0], method="length_normalised", self_normalised=True)
    assert normalised == pytest.approx(np.exp([-2, -1]) / np.exp([-2, -1]).sum())


def test_a_longer_gold_answer_is_not_punished_by_length_normalisation() -> None:
    scored = [one(-6.0, 6), one(-1.0, 1)]
    config = WeightingConfig(method="length_normalised")
    assert weights_of(scored, config) == pytest.approx([math.exp(-1)] * 2)


@pytest.mark.parametrize("method", METHODS)
@given(values=log_likelihoods, times=st.integers(1, 4))
def test_a_question_with_more_trajectories_than_others_counts_as_much_as_they_do(
    method: str, values: list[float], times: int
) -> None:
    config = WeightingConfig.model_validate({"method": method})
    usual = [one(value, reward=math.exp(value / 500)) for value in values]
    expected = weights_of(usual, config).sum()
    further = [replace(scored, further=True) for scored in usual * (times - 1)]
    found = np.exp(log_weights(usual + further, config)).sum()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_a_question_that_lost_trajectories_is_not_made_up_for() -> None:
    config = WeightingConfig()
    further = [one(-1.0, further=True)] * 2
    assert np.exp(log_weights([one(-1.0), *further], config)).sum() == pytest.approx(math.exp(-1.0))


def test_the_bound_is_that_of_the_trajectories_that_were_not_sampled_because_of_others() -> None:
    failed, found = one(math.log(0.01)), one(math.log(0.9), further=True)
    config = WeightingConfig()
    assert bound_of([failed, found, found], config) == pytest.approx(math.log(0.01))
    assert bound_of([found], config) == pytest.approx(math.log(0.9))  # those before it could not be scored
    summary = summarise([[failed, failed, found, found]], [np.zeros(4)], config)
    assert summary.mean_likelihood == pytest.approx(0.01)


def test_uniform_weights_are_one_over_k() -> None:
    assert weights([-1.0, -50.0, 0.0, -3.0], method="uniform") == pytest.approx([0.25] * 4)


def test_a_higher_reward_gives_a_higher_weight() -> None:
    # Defect in the wild: a metric fed through exp(-x) trains on the worst answers.
    scored = [one(-1.0, 2, reward=reward) for reward in (0.0, 0.4, 1.0)]
    assert weights_of(scored, WeightingConfig(method="reward")).tolist() == [0.0, 0.4, 1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("method", ["likelihood", "posterior", "length_normalised"])
@given(values=log_likelihoods)
def test_a_more_likely_gold_answer_never_gets_a_smaller_weight(
    method: str, temperature: float, values: list[float]
) -> None:
    result = weights(values, method=method, temperature=temperature)
    order = np.argsort(values, kind="stable")
    assert (np.diff(result[order]) >= 0).all()
    assert np.isfinite(result).all()
    assert (result >= 0).all()


@given(values=log_likelihoods, temperature=st.floats(0.2, 5))
def test_posterior_weights_of_a_question_sum_to_one(values: list[float], temperature: float) -> None:
    assert weights(values, method="posterior", temperature=temperature).sum() == pytest.approx(1.0)


@given(values=log_likelihoods, shift=st.floats(-200, 0))
def test_posterior_weights_do_not_change_when_all_answers_become_less_likely(
    values: list[float], shift: float
) -> None:
    shifted = [value + shift for value in values]
    assert weights(shifted, method="posterior") == pytest.approx(
        weights(values, method="posterior"), abs=1e-9
    )


def test_posterior_weights_survive_answers_too_unlikely_for_floating_point() -> None:
    assert weights([-5000.0, -5001.0], method="posterior") == pytest.approx(
        weights([-1.0, -2.0], method="posterior")
    )


@given(values=st.lists(st.floats(-20, 0), min_size=2, max_size=6))
def test_the_floor_leads_from_the_exact_posterior_to_the_likelihood(values: list[float]) -> None:
    exact, likelihood = np.exp(values) / np.exp(values).sum(), np.exp(values)
    assert weights(values, method="posterior", floor=0.0) == pytest.approx(exact, rel=1e-9)
    huge = weights(values, method="posterior", floor=1e9)
    assert huge / huge.max() == pytest.approx(likelihood / likelihood.max(), rel=1e-6)
    middle = weights(values, method="posterior", floor=0.1)
    assert middle == pytest.approx(likelihood / (0.1 + likelihood.sum()), rel=1e-9)


def test_with_a_floor_a_question_whose_trajectories_all_fail_fades_out() -> None:
    failed = weights([-30.0, -31.0], method="posterior", floor=1e-3)
    assert failed.max() < 1e-9
    assert weights([-30.0, -31.0], method="posterior").max() > 0.7


@pytest.mark.parametrize("method", METHODS)
def test_a_questions_weights_do_not_depend_on_the_company_it_is_scored_in(method: str) -> None:
    # Defect in the wild: a normaliser over the shuffled micro-batch instead of one question's trajectories.
    config = WeightingConfig.model_validate({"method": method})
    good = [one(-0.1, 2, correct=True, reward=1.0), one(-0.2, 2, correct=True, reward=1.0)]
    bad = [one(-40.0, 2), one(-41.0, 2)]
    alone = weights_of(bad, config)
    together = [log_weights(group, config) for group in (good, bad)]
    assert np.exp(together[1]).tolist() == alone.tolist()
    assert summarise([good, bad], together, config).questions == 2


def test_only_the_answers_likelihood_counts_not_the_trajectorys_length_or_probability() -> None:
    # Defect in the wild: scoring the mean NLL of every assistant token. A trajectory enters by the likelihood
    # of the gold answer behind it; how probable its own words were changes nothing by default.
    scored = [one(-1.0, 3, log_ratio=-5.0), one(-1.0, 3, log_ratio=0.0)]
    for method in ("likelihood", "posterior", "length_normalised"):
        result = weights_of(scored, WeightingConfig.model_validate({"method": method}))
        assert result[0] == result[1]


def test_the_proposal_correction_multiplies_by_the_clipped_ratio() -> None:
    scored = [one(-1.0, 3, log_ratio=ratio) for ratio in (-1.0, 0.0, 10.0)]
    config = WeightingConfig(method="uniform", correct_proposal=True, max_ratio=2.0)
    assert weights_of(scored, config) * 3 == pytest.approx([math.exp(-1), 1.0, 2.0])


def test_the_proposal_correction_keeps_self_normalised_weights_normalised() -> None:
    scored = [one(-1.0, 3, log_ratio=math.log(2)), one(-1.0, 3, log_ratio=0.0)]
    for settings in ({"method": "posterior"}, {"method": "length_normalised", "self_normalised": True}):
        config = WeightingConfig.model_validate(settings | {"correct_proposal": True})
        assert weights_of(scored, config) == pytest.approx([2 / 3, 1 / 3])


def test_weights_are_clipped_at_the_maximum() -> None:
    assert weights([0.0, -5.0], method="likelihood", max_weight=0.5) == pytest.approx([0.5, math.exp(-5)])


@pytest.mark.parametrize("values", [[], [float("nan")], [0.5]])
def test_impossible_log_likelihoods_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"trajectories|at most 0"):
        weights(values, method="likelihood")


def test_rounding_above_zero_is_taken_as_certainty() -> None:
    assert weights([1e-6], method="likelihood").tolist() == [1.0]


@pytest.mark.parametrize("method", ["likelihood", "posterior", "length_normalised"])
def test_weights_of_answers_too_long_for_floating_point_keep_their_ratios(method: str) -> None:
    # exp(-2000) is 0: the M-step did nothing, with a warning.
    logs = log_weights([one(-2000.0), one(-2003.0)], WeightingConfig.model_validate({"method": method}))
    assert np.isfinite(logs).all()
    assert logs[0] - logs[1] == pytest.approx({"length_normalised": 1.0}.get(method, 3.0))


@pytest.mark.parametrize("method", ["likelihood", "posterior", "length_normalised"])
def test_impossible_answers_get_weight_zero(method: str) -> None:
    assert weights([-math.inf, -1.0], method=method)[0] == 0.0
    assert weights([-math.inf, -math.inf], method=method).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- several gold answers


def test_the_likelihood_of_several_gold_answers_is_that_of_their_set() -> None:
    # The maximum would understate it, by up to log 2 where both are as likely.
    golds = [Gold(math.log(0.3), 2), Gold(math.log(0.2), 5)]
    scored = Scored.of(golds)
    assert scored.log_likelihood == pytest.approx(math.log(0.5))
    assert weights_of([scored], WeightingConfig()) == pytest.approx([0.5])
    assert bound_of([scored], WeightingConfig()) == pytest.approx(math.log(0.5))
    with pytest.raises(ValueError, match="without answers"):
        Scored.of([])


def test_of_several_gold_answers_the_most_likely_is_trained_and_of_equals_the_first() -> None:
    golds = {"a": Gold(-3.0, 1), "b": Gold(-1.0, 1), "c": Gold(-1.0, 9)}
    assert trained_gold(golds, WeightingConfig()) == "b"


def test_length_normalised_takes_the_gold_answer_that_is_best_per_token_not_in_all() -> None:
    golds = {"short": Gold(-2.0, 3), "long": Gold(-2.5, 10)}
    config = WeightingConfig(method="length_normalised")
    assert weights_of([Scored.of(list(golds.values()))], config) == pytest.approx([0.779], abs=5e-4)
    assert trained_gold(golds, config) == "long"
    assert trained_gold(golds, WeightingConfig()) == "short"


# ---------------------------------------------------------------- mean-normalised rewards


@given(rewards=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_mean_normalised_rewards_count_each_question_alike_or_not_at_all(rewards: list[float]) -> None:
    assume(not 0 < sum(rewards) < 1e-300)
    config = WeightingConfig(method="reward", self_normalised=True)
    found = weights_of([one(-1.0, reward=reward) for reward in rewards], config)
    mean = np.mean(rewards)
    assert found * len(rewards) == pytest.approx(np.array(rewards) / mean if mean else np.zeros(len(rewards)))


def test_a_question_with_one_success_weighs_as_much_as_one_with_three() -> None:
    config = WeightingConfig(method="reward", self_normalised=True, reward="em")
    rare = weights_of([one(-1.0, reward=r) for r in (1.0, 0.0, 0.0, 0.0)], config)
    often = weights_of([one(-1.0, reward=r) for r in (1.0, 1.0, 1.0, 0.0)], config)
    assert (rare.tolist(), often.tolist()) == ([1, 0, 0, 0], pytest.approx([1 / 3, 1 / 3, 1 / 3, 0]))


# ---------------------------------------------------------------- the baseline


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@given(value=st.floats(-30, 0), baseline=st.floats(-30, 0))
def test_the_baseline_is_subtracted_down_to_zero(temperature: float, value: float, baseline: float) -> None:
    config = WeightingConfig(subtract_baseline=True, temperature=temperature)
    expected = max(0.0, math.exp(value / temperature) - math.exp(baseline / temperature))
    assert weights_of([one(value, before=(baseline,))], config) == pytest.approx([expected], abs=1e-14)


def test_what_cannot_be_guessed_keeps_its_weight_and_a_guess_has_none() -> None:
    config = WeightingConfig(subtract_baseline=True)
    scored = [one(-1.0, before=(-math.inf,)), one(-2000.0, before=(-2010.0,)), one(math.log(0.5), before=())]
    logs = log_weights(scored, config)
    assert logs[0] == -1.0
    assert logs[1] == pytest.approx(-2000.0 + math.log1p(-math.exp(-10)))
    assert logs[2] == -math.inf  # it never began a turn: it is its own baseline


def test_of_a_yes_or_no_the_posterior_is_on_the_trajectory_that_found_something() -> None:
    scored = [one(math.log(0.9), before=(math.log(0.5),)), one(math.log(0.5), before=(math.log(0.5),))]
    plain = WeightingConfig(method="posterior")
    assert weights_of(scored, plain) == pytest.approx([0.9 / 1.4, 0.5 / 1.4])
    assert weights_of(scored, plain.model_copy(update={"subtract_baseline": True})).tolist() == [1.0, 0.0]
    nothing_found = weights_of(scored[1:] * 2, plain.model_copy(update={"subtract_baseline": True}))
    assert nothing_found.tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- figures of an E-step


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=8), scale=st.sampled_from([0.0, -500.0, -1e6]))
def test_effective_sample_size_lies_between_one_and_k_whatever_the_scale(
    values: list[float], scale: float
) -> None:
    assume(max(values) > 1e-300)
    with np.errstate(divide="ignore"):
        logs = np.log(values) + scale
    assert 1 - 1e-9 <= effective_sample_size(logs) <= len(values) + 1e-6


def test_effective_sample_size_of_known_cases() -> None:
    assert effective_sample_size(np.zeros(4)) == pytest.approx(4)
    assert effective_sample_size(np.array([-np.inf, -900.0, -np.inf])) == pytest.approx(1)
    assert effective_sample_size(np.full(3, -np.inf)) == 0
    assert effective_sample_size(np.log([1.0, 3.0])) == pytest.approx(1.6)


@given(values=log_likelihoods)
def test_the_bound_of_a_question_is_the_log_of_the_mean_likelihood(values: list[float]) -> None:
    bound = bound_of([one(value) for value in values], WeightingConfig())
    assert min(values) - 1e-9 <= bound <= max(values) + 1e-9
    if max(values) > -300:
        assert bound == pytest.approx(math.log(np.mean(np.exp(values))), rel=1e-6, abs=1e-9)


def test_the_bound_of_a_corrected_proposal_is_of_the_model_and_not_of_what_was_sampled_from() -> None:
    # Four trajectories that a proposal finds equally likely; under the model their probabilities are these.
    model, gold = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.9, 0.2, 0.1, 0.1])
    scored = [one(math.log(y), log_ratio=math.log(p / 0.25)) for p, y in zip(model, gold, strict=True)]
    config = WeightingConfig(correct_proposal=True, max_ratio=10.0)
    assert bound_of(scored, config) == pytest.approx(math.log((model * gold).sum()))
    # Clipped it is lower, so still a bound.
    assert bound_of(scored, WeightingConfig(correct_proposal=True, max_ratio=2.0)) < math.log(
        (model * gold).sum()
    )


def test_the_summary_of_an_e_step() -> None:
    groups = [
        [one(math.log(0.5), 1, correct=True), one(math.log(0.1), 1)],
        [one(math.log(0.2), 1), one(math.log(0.2), 1)],
    ]
    config = WeightingConfig(method="likelihood")
    summary = summarise(groups, [log_weights(group, config) for group in groups], config)
    bounds = [math.log(0.3), math.log(0.2)]
    assert summary.likelihood_bound == pytest.approx(np.mean(bounds))
    assert summary.likelihood_bound_stderr == pytest.approx(np.std(bounds, ddof=1) / math.sqrt(2))
    assert summary.effective_sample_size == pytest.approx((0.36 / 0.26 + 2) / 2)
    assert summary.all_failed_share == 50.0
    assert summary.mean_weight == pytest.approx(0.25)
    assert summary.likelihood_bound_median == pytest.approx(np.median(bounds))
    assert (summary.mean_likelihood, summary.median_likelihood) == pytest.approx((0.25, 0.25))
    assert summary.mean_likelihood_stderr == pytest.approx(0.05)
    assert summary.global_effective_sample_size == pytest.approx(1.0 / (0.25 + 0.01 + 0.04 + 0.04))
    assert (summary.weighted_trajectories, summary.proposal_ratio) == (4, None)
    with pytest.raises(ValueError, match="0 questions"):
        summarise([], [], config)


def test_a_few_questions_that_make_up_most_of_the_bound_are_seen_beside_its_median() -> None:
    groups = [[one(-40.0)], *[[one(-1.0)] for _ in range(18)], [one(0.0)]]
    config = WeightingConfig()
    summary = summarise(groups, [log_weights(group, config) for group in groups], config)
    assert summary.likelihood_bound == pytest.approx(-58 / 20)
    assert (summary.likelihood_bound_median, summary.likelihood_bound_trimmed) == (-1.0, -1.0)
    assert summary.median_likelihood == pytest.approx(math.exp(-1.0))
    # One trajectory each: the mean over questions says nothing, together they are no twenty.
    assert summary.effective_sample_size == pytest.approx(1.0)
    w = np.exp([-40.0, *[-1.0] * 18, 0.0])
    assert summary.global_effective_sample_size == pytest.approx(w.sum() ** 2 / (w**2).sum())


def test_the_summary_says_what_the_correction_of_the_proposal_did() -> None:
    ratios = [[0.5, 4.0], [1.0, 8.0]]
    groups = [[one(-1.0, log_ratio=math.log(ratio)) for ratio in group] for group in ratios]
    config = WeightingConfig(correct_proposal=True, max_ratio=2.0)
    found = summarise(groups, [log_weights(group, config) for group in groups], config).proposal_ratio
    assert found is not None
    clipped = [0.5, 2.0, 1.0, 2.0]
    assert (found.trajectories, found.clipped_share) == (4, 50.0)
    assert (found.mean, found.mean_clipped) == pytest.approx((13.5 / 4, 5.5 / 4))
    assert found.effective_sample_size == pytest.approx(sum(clipped) ** 2 / sum(r * r for r in clipped))


def test_the_mean_ratio_of_a_truncated_proposal_is_what_truncation_keeps() -> None:
    # Of four trajectories the proposal never samples the last one, and renormalises the others: p / q is their share.
    model = np.array([0.4, 0.3, 0.2, 0.1])
    proposal = model[:3] / model[:3].sum()
    groups = [[one(-1.0, log_ratio=math.log(p / q)) for p, q in zip(model, proposal, strict=False)]]
    config = WeightingConfig(correct_proposal=True)
    found = summarise(groups, [log_weights(group, config) for group in groups], config).proposal_ratio
    assert found is not None and found.mean == pytest.approx(0.9)


def test_a_ratio_beyond_all_numbers_breaks_no_other_figure() -> None:
    groups = [[one(-1.0, log_ratio=900.0), one(-1.0)]]
    config = WeightingConfig(correct_proposal=True)
    found = summarise(groups, [log_weights(group, config) for group in groups], config).proposal_ratio
    assert found is not None and (found.mean, found.mean_clipped) == (math.inf, pytest.approx(1.5))


def test_an_impossible_question_takes_the_bound_down_and_breaks_no_other_figure() -> None:
    groups = [[one(-math.inf)], [one(-1.0)]]
    config = WeightingConfig()
    summary = summarise(groups, [log_weights(group, config) for group in groups], config)
    assert (summary.likelihood_bound, summary.likelihood_bound_stderr) == (-math.inf, 0.0)
    assert summary.mean_likelihood == pytest.approx(math.exp(-1.0) / 2)
    assert summary.mean_weight == pytest.approx(math.exp(-1.0) / 2)


def test_the_pure_modules_load_no_engine_no_cluster_and_no_trainer() -> None:
    code = (
        "import sys, pipeline.core.weighting, pipeline.core.losses.likelihood, pipeline.core.renderer, "
        "pipeline.core.agents.search, "
        "pipeline.core.evaluation, pipeline.core.data.questions, pipeline.core.data.cold_start\n"
        "print(sorted({'ray', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"
