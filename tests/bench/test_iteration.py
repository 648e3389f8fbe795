"""The row of a whole iteration, from the seconds of its phases."""

from __future__ import annotations

import pytest

from bench.iteration import GOAL, ratio_of

LIMIT = {"E-step": 10.0, "M-step": 9.99, "checkpoint": 0.0, "push": 0.01}


def test_an_iteration_is_compared_with_the_sum_of_its_phases() -> None:
    ours = {"E-step": 14.0, "M-step": 7.0, "checkpoint": 1.5, "push": 0.5}

    ratio = ratio_of(100, [ours, ours], [LIMIT, LIMIT])

    assert ratio.ours == [pytest.approx(100 / 23.0)] * 2
    assert ratio.limit == [pytest.approx(5.0)] * 2
    assert ratio.ratios == [pytest.approx(20.0 / 23.0)] * 2
    assert ratio.goal == GOAL == pytest.approx(20.0 / 23.0)
