"""A phase keeps engines busy that only take time, on a clock that jumps."""

from __future__ import annotations

import pytest

from bench.dispatch import dispatched_s
from bench.scale import ideal_s, lock_step_s, questions
from bench.stand_in import Pace


@pytest.mark.parametrize("samples", [1, 4, 8])
def test_no_slot_is_empty_for_long_though_a_task_is_in_hand_until_its_longest_episode_is_done(
    samples: int,
) -> None:
    pace, number = Pace(), 1600 // samples
    took = dispatched_s(pace, 4, 16, questions(number), samples)
    assert took == pytest.approx(ideal_s(pace, 4, 16, number, samples), rel=0.08)


def test_a_slow_retriever_and_lengths_with_a_long_tail_take_lock_step_twice_as_long() -> None:
    pace = Pace(search_s=0.3)
    assert lock_step_s(pace, 4, 40, 400) > 2 * dispatched_s(pace, 4, 40, questions(400))
