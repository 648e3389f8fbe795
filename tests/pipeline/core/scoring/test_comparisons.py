"""Bootstraps beside what theory says of them, and Holm's correction beside R's `p.adjust`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.scoring.comparisons import (
    bootstrap_table,
    common_scores,
    difference_table,
    holm,
    score_estimate,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_runs_share_what_all_of_them_have() -> None:
    ids, scores = common_scores([{"a": 0.0, "b": 1.0, "c": 0.5}, {"c": 1.0, "b": 0.0}])
    assert ids == ["b", "c"]
    assert scores.tolist() == [[1.0, 0.5], [0.0, 1.0]]


def test_scores_that_are_all_the_same_are_no_certainty() -> None:
    none, whole = score_estimate(np.zeros((3, 20))), score_estimate(np.ones((3, 20)))

    assert (none.mean, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.161, abs=1e-3)
    assert (whole.mean, whole.high) == (1.0, 1.0) and whole.low == pytest.approx(0.839, abs=1e-3)


def test_of_one_seed_the_interval_is_that_of_the_mean_of_its_questions() -> None:
    values = np.random.default_rng(1).normal(0.05, 1.0, (1, 400))

    found = bootstrap_table(values)

    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.01)


def test_mcnemars_normal_approximation_is_met_by_the_p_value_of_paired_answers() -> None:
    """30 questions only the first answers, 12 only the second, of 200: z = (30 - 12) / sqrt(30 + 12), p = 0.0055."""
    values = np.array([[1.0] * 30 + [-1.0] * 12 + [0.0] * 158])

    found = bootstrap_table(values, samples=40_000)

    assert found.mean == pytest.approx(0.09)
    assert found.p == pytest.approx(0.0055, abs=0.003)
    assert found.low > 0


def test_what_seeds_have_in_common_is_not_taken_for_more_questions() -> None:
    one = np.random.default_rng(2).normal(0.0, 1.0, (1, 300))
    same = np.repeat(one, 4, axis=0)

    alone, repeated = bootstrap_table(one), bootstrap_table(same)

    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_seeds_that_differ_make_an_interval_wider_whatever_the_number_of_questions() -> None:
    offsets = np.array([[-0.1], [0.0], [0.1]])

    found = bootstrap_table(np.repeat(offsets, 5_000, axis=1))

    assert (found.low, found.high) == pytest.approx((-0.1, 0.1), abs=0.04)
    assert found.p > 0.5


def test_no_difference_at_all_is_no_evidence_and_the_same_everywhere_is_the_most_there_can_be() -> None:
    nothing, always = bootstrap_table(np.zeros((3, 50))), bootstrap_table(np.ones((3, 50)), samples=999)

    assert (nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 1.0)
    assert (always.low, always.high, always.p) == (1.0, 1.0, pytest.approx(0.002))


def test_what_few_questions_say_does_not_grow_with_the_seeds_that_repeat_it() -> None:
    found = difference_table(np.ones((3, 4)))
    assert found.p == 0.125
    assert 0 < found.low < found.high == 1.0
    nothing = difference_table(np.zeros((3, 50)))
    assert (nothing.mean, nothing.p) == (0.0, 1.0) and nothing.low == -nothing.high < 0


def test_differences_of_many_questions_are_judged_as_any_table() -> None:
    values = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], (3, 200), p=[0.1, 0.7, 0.2])
    assert difference_table(values, samples=999) == bootstrap_table(values, samples=999)


def test_the_same_seed_gives_the_same_interval_and_the_other_sign_the_mirrored_one() -> None:
    values = np.random.default_rng(3).normal(0.02, 1.0, (3, 100))

    found, again, mirrored = (bootstrap_table(v, samples=2_500) for v in (values, values, -values))

    assert found == again
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-found.high, -found.low, found.p))


def test_holms_correction_is_that_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")"""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(P_VALUES)
def test_a_correction_lies_between_the_p_value_and_bonferronis_and_keeps_the_order(
    p_values: list[float],
) -> None:
    adjusted = holm(p_values)

    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(p_values) * p) or corrected == pytest.approx(p)
    ranked = [corrected for _, corrected in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)
