"""Intervals: beside scipy's, and where a bootstrap alone would be a point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pipeline.core.scoring.intervals import bootstrap, wilson


@given(n=st.integers(1, 3000), data=st.data())
def test_the_interval_of_a_share_is_wilsons(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    expected = binomtest(right, n).proportion_ci(method="wilson")
    low, high = wilson(right, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1


def test_none_of_163_is_not_known_to_be_none() -> None:
    assert wilson(0, 163) == (0.0, pytest.approx(0.0230, abs=1e-4))
    assert wilson(163, 163) == (pytest.approx(0.9770, abs=1e-4), 1.0)


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 17, 163])
def test_equal_scores_are_as_unsure_as_the_share_of_as_many_questions(n: int, score: float) -> None:
    assert bootstrap([score] * n, 200, seed=0) == wilson(int(score) * n, n)


def test_one_question_says_little_whatever_its_score() -> None:
    low, high = bootstrap([0.5], 200, seed=0)
    assert low < 0.25 and high > 0.75


def test_of_many_different_scores_the_interval_is_the_bootstraps() -> None:
    scores = np.random.default_rng(0).random(500)
    low, high = bootstrap(scores.tolist(), 2000, seed=0)
    half = 1.96 * scores.std() / np.sqrt(500)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)
    assert (low, high) != bootstrap(scores.tolist(), 2000, seed=1)
