"""How good a trajectory is by what it came to: a metric of its answer, or a function of the user's own.

`weighting.reward` and `grpo.reward` name it. A reward sees the question with all that is known of it and the whole
trajectory; it is computed where trajectories are weighted, while others are still sampled. docs/rewards.md writes one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

from pipeline.core.errors import UserError
from pipeline.core.own_modules import of_own_module
from pipeline.core.records import Question, Trajectory
from pipeline.core.scoring.answers import METRICS, AnswerScore


class Reward(Protocol):
    """May be computed again of a trajectory, with the same result."""

    def __call__(self, question: Question, trajectory: Trajectory) -> float: ...


def is_own(name: str) -> bool:
    """Whether it names a function of the user's."""
    return name not in METRICS


@lru_cache(maxsize=16)
def load_reward(key: str, name: str) -> Reward:
    """The function `module:function` that a key of the configuration names.

    Raises:
        UserError: there is none.
    """
    where = f"{key}: {name}"
    found = of_own_module(where, name, "function", "rewards:short_and_right")
    if not callable(found):
        raise UserError(f"{where} is no function")
    reward: Reward = found
    return reward


def check_reward(key: str, name: str) -> None:
    """
    Raises:
        UserError: it names a function that is not there.
    """
    if is_own(name):
        load_reward(key, name)


def reward_of(
    key: str,
    name: str,
    question: Question,
    trajectory: Trajectory,
    score: AnswerScore,
    least: float = -math.inf,
) -> float:
    """The reward of a trajectory, whose own answer has that score.

    Args:
        key: of the configuration, for messages.
        least: below which a reward makes no sense.

    Raises:
        UserError: the user's function gives no finite number, or one below the least.
    """
    if not is_own(name):
        return float(getattr(score, name))
    found = load_reward(key, name)(question, trajectory)
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        at_least = "" if math.isinf(least) else f" of at least {least:g}"
        raise UserError(
            f"{key}: {name} gives {found!r} for a trajectory of question {question.id}; it must give a finite "
            f"number{at_least}"
        )
    return value
