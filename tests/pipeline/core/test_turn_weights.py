"""Weights of turns: what the likelihood of the answer gains with each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import WeightingConfig
from pipeline.core.weighting import log_weights, turn_credits, turn_log_weights
from tests.pipeline.weights_support import one

turn_values = st.lists(st.floats(-40, 0), min_size=1, max_size=6)


@given(values=turn_values, scale=st.sampled_from([0.0, -500.0, -1e5]))
def test_the_gains_of_the_turns_sum_to_what_the_whole_is_worth_beyond_its_baseline(
    values: list[float], scale: float
) -> None:
    logs = np.array(values) + scale
    gains, log_unit = turn_credits(logs, 0.0)
    q = np.exp(logs - log_unit)
    assert gains.sum() == pytest.approx(q[-1] - q[0], abs=1e-12)
    assert log_unit == logs.max()


@given(values=turn_values, decay=st.floats(0, 1))
def test_a_turn_is_credited_with_its_gain_and_what_comes_of_it(values: list[float], decay: float) -> None:
    credits, log_unit = turn_credits(np.array(values), decay)
    q = np.exp(values)
    expected = [sum(decay ** (j - i) * (q[j] - q[j - 1]) for j in range(i, len(q))) for i in range(1, len(q))]
    assert credits * math.exp(log_unit) == pytest.approx(expected, abs=1e-12)


@given(
    group=st.lists(turn_values, min_size=2, max_size=5),
    decay=st.floats(0, 1),
    method=st.sampled_from(["likelihood", "posterior"]),
)
def test_turns_weigh_their_credit_in_the_measure_of_the_trajectory_and_never_less_than_nothing(
    group: list[list[float]], decay: float, method: str
) -> None:
    config = WeightingConfig.model_validate({"method": method, "credit": "turn", "credit_decay": decay})
    scored = [one(values[-1], before=tuple(values[:-1])) for values in group]
    own, by_turn = log_weights(scored, config), turn_log_weights(scored, config)
    for values, log, logs in zip(group, own, by_turn, strict=True):
        credits, log_unit = turn_credits(np.array(values), decay)
        assert len(logs) == len(values) - 1
        # exp(log) is the trajectory's weight, of the likelihood exp(values[-1]).
        in_measure = np.exp(logs - log + values[-1])
        most = math.exp(values[-1] - log) if method == "posterior" else 1.0
        expected = np.minimum(np.maximum(credits, 0) * math.exp(log_unit), most)
        assert in_measure == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert (np.exp(logs - log) <= np.exp(log_unit - values[-1]) * (1 + 1e-9)).all()


@given(
    group=st.lists(turn_values, min_size=1, max_size=5),
    decay=st.floats(0, 1),
    method=st.sampled_from(["likelihood", "posterior"]),
    baseline=st.booleans(),
)
def test_no_turn_outweighs_everything_by_what_a_later_one_lost_again(
    group: list[list[float]], decay: float, method: str, baseline: bool
) -> None:
    keys = {"method": method, "credit": "turn", "credit_decay": decay, "subtract_baseline": baseline}
    scored = [one(values[-1], before=tuple(values[:-1])) for values in group]
    for own in turn_log_weights(scored, WeightingConfig.model_validate(keys)):
        assert (own <= 1e-12).all()


def test_a_search_behind_the_one_that_found_the_answer_has_no_credit() -> None:
    config = WeightingConfig(credit="turn")
    found_at_once = one(math.log(0.9), before=(math.log(0.1), math.log(0.9), math.log(0.9)))
    (weights,) = map(np.exp, turn_log_weights([found_at_once], config))
    assert weights == pytest.approx([0.8, 0.0, 0.0])


def test_the_first_search_of_two_is_paid_for_by_the_second_unless_each_turn_stands_alone() -> None:
    two_hops = one(math.log(0.9), before=(math.log(0.1), math.log(0.1)))
    for decay, expected in ((1.0, [0.8, 0.8]), (0.5, [0.4, 0.8]), (0.0, [0.0, 0.8])):
        config = WeightingConfig(credit="turn", credit_decay=decay)
        assert np.exp(turn_log_weights([two_hops], config)[0]) == pytest.approx(expected)


def test_the_first_turn_of_a_trajectory_weighs_what_the_baseline_leaves_of_it() -> None:
    scored = [one(-1.0, before=(-2.0, -1.5)), one(-3.0, before=(-2.0,)), one(-2.0, before=())]
    for method in ("likelihood", "posterior"):
        turn = WeightingConfig.model_validate({"method": method, "credit": "turn"})
        first = [logs[0] for logs in turn_log_weights(scored[:2], turn)]
        divisor = {"likelihood": 1.0}.get(method, math.exp(-1.0) + math.exp(-3.0))
        assert np.exp(first) == pytest.approx([(math.exp(-1.0) - math.exp(-2.0)) / divisor, 0.0])
    assert [len(logs) for logs in turn_log_weights(scored, WeightingConfig(credit="turn"))] == [2, 1, 0]


def test_impossible_answers_credit_no_turn() -> None:
    config = WeightingConfig(method="posterior", credit="turn")
    for scored in ([one(-math.inf, before=(-math.inf,))] * 2, [one(-math.inf, before=(-1.0,))] * 2):
        assert [np.exp(logs).tolist() for logs in turn_log_weights(scored, config)] == [[0.0], [0.0]]


def test_the_proposals_ratio_and_the_clip_are_those_of_the_trajectory() -> None:
    config = WeightingConfig(credit="turn", correct_proposal=True, max_weight=0.5)
    scored = [one(math.log(0.9), before=(math.log(0.1),), log_ratio=math.log(0.25))]
    assert np.exp(turn_log_weights(scored, config)[0]) == pytest.approx([0.2])
    scored = [one(math.log(0.9), before=(math.log(0.1),))]
    assert np.exp(turn_log_weights(scored, config)[0]) == pytest.approx([0.5])


def test_a_question_with_more_trajectories_than_others_credits_its_turns_no_more() -> None:
    config = WeightingConfig(credit="turn")
    two = [one(math.log(0.6), before=(math.log(0.1), math.log(0.3)))] * 2
    further = [replace(scored, further=True) for scored in two * 2]
    usual, more = turn_log_weights(two, config), turn_log_weights(two + further, config)
    assert np.exp(more).sum(0) == pytest.approx(np.exp(usual).sum(0))
