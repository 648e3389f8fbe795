"""The learning rate over one M-step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.core.schedule import learning_rate_at


def rates(num_steps: int, warmup_ratio: float = 0.1, min_ratio: float = 0.0) -> list[float]:
    return [
        learning_rate_at(step, num_steps, peak=2.0, warmup_ratio=warmup_ratio, min_ratio=min_ratio)
        for step in range(num_steps)
    ]


def test_rate_rises_linearly_to_the_peak_and_falls_as_a_cosine() -> None:
    found = rates(20, warmup_ratio=0.2)
    assert found[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert found[12] == pytest.approx(1.0)  # half-way down
    assert all(a > b for a, b in pairwise(found[4:]))


def test_no_step_is_without_learning_even_in_the_shortest_phases() -> None:
    assert rates(1) == [2.0]
    assert all(rate > 0 for count in (2, 3, 11) for rate in rates(count))


def test_cosine_ends_near_the_asked_share_of_the_peak() -> None:
    assert rates(1000, min_ratio=0.25)[-1] == pytest.approx(0.5, abs=1e-3)
