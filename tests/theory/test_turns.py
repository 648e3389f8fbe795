"""Turn-wise credit: what the turns of a trajectory gain sums to what the whole of it is worth beyond a guess."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.weighting import turn_credits

VALUES = st.lists(st.floats(-30, 0), min_size=2, max_size=7).map(np.array)
"""log q_0 .. log q_T."""


@given(VALUES)
def test_gains_sum_to_what_the_trajectory_is_worth_beyond_a_guess(values: np.ndarray) -> None:
    gains, log_unit = turn_credits(values, 0.0)
    worth = np.exp(values[-1]) - np.exp(values[0])
    assert gains.sum() * np.exp(log_unit) == pytest.approx(worth, abs=1e-12)


@given(VALUES, st.floats(0, 1))
def test_a_turn_is_credited_with_what_comes_behind_it_the_less_the_later(
    values: np.ndarray, decay: float
) -> None:
    gains = np.diff(np.exp(values))
    credits, log_unit = turn_credits(values, decay)
    for i in range(len(gains)):
        behind = sum(decay ** (j - i) * gains[j] for j in range(i, len(gains)))
        assert credits[i] * np.exp(log_unit) == pytest.approx(behind, abs=1e-12)
