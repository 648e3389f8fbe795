"""Turn-wise weights (`weighting.credit: turn`), put onto the tokens of an example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.core.copies import CREDIT
from pipeline.core.records import Example, Trajectory
from pipeline.core.weighting import Array, log_mean


def with_turn_weights(example: Example, trajectory: Trajectory, turn_log_weights: Array) -> Example:
    """The example, each turn of which weighs what it is credited with, and the answer what the example weighed whole.

    `log_weight` becomes the logarithm of the average weight of a target, and the stream `credit` [T] the weight of
    each token relative to that: it averages 1 over the targets.

    Args:
        example: of the trajectory, with whatever answer behind it.
        turn_log_weights: log w of each turn, as many as the trajectory has (`Trajectory.turn_starts`).
    """
    logs = np.full(example.length, example.number("log_weight"))
    front = np.arange(trajectory.answer_start)
    turn = np.searchsorted(trajectory.turn_starts, front, side="right") - 1
    in_turns = turn >= 0  # in front of the first one there is no target
    logs[front[in_turns]] = turn_log_weights[turn[in_turns]]
    targets = np.flatnonzero(example.loss_mask[1:]) + 1
    average, credit = -np.inf, np.ones(example.length)
    if len(targets):
        average = log_mean(logs[targets])
    if not np.isneginf(average):
        credit[targets] = np.exp(logs[targets] - average)
    return replace(
        example, streams=dict(example.streams) | {"log_weight": np.array([average]), CREDIT: credit}
    )
