"""Exact copies among the examples of a unit: one example of their summed weight, which gives the same gradient.

Trajectories of a question that went the same way become examples of the same tokens and targets once the gold answer
stands in place of their own. In the weighted likelihood (`pipeline.core.losses.likelihood`)

    sum_{k in copies} w_k sum_t c_kt log p(token_t | before)  =  W sum_t C_t log p(token_t | before)
    W = sum_k w_k,   C_t = sum_k w_k c_kt / W

so one forward and backward pass does for all of them. What counts examples or their tokens (steps, normaliser,
averages) counts such an example `copies_of` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.core.records import Example, Outline
from pipeline.core.weighting import log_sum

COPIES = "copies"
"""The stream with the number of examples that one stands for; without it, itself alone."""

CREDIT = "credit"
"""The stream with c: the weight of each token relative to the average of its example's targets."""


def copies_of(example: Outline) -> int:
    """How many examples it stands for."""
    return int(example.number(COPIES)) if COPIES in example.shapes else 1


def merge_copies(examples: Sequence[Example]) -> list[Example]:
    """Of the examples of one unit those that differ, each with the summed weight of its copies.

    Each keeps the id, and the place, of the first of them.

    Args:
        examples: with the stream `log_weight`, and where their tokens weigh differently `credit`.
    """
    groups: dict[tuple[bytes, bytes], list[Example]] = {}
    for example in examples:
        key = (example.token_ids.tobytes(), example.loss_mask.tobytes())
        groups.setdefault(key, []).append(example)
    return [_as_one(group) if len(group) > 1 else group[0] for group in groups.values()]


def _as_one(copies: Sequence[Example]) -> Example:
    logs = np.array([example.number("log_weight") for example in copies])
    total = log_sum(logs)
    streams = {"log_weight": np.array([total]), COPIES: np.array([float(len(copies))])}
    if CREDIT in copies[0].streams:
        shares = np.full(len(copies), 1 / len(copies)) if np.isneginf(total) else np.exp(logs - total)
        streams[CREDIT] = shares @ np.stack([example.streams[CREDIT] for example in copies])
    return replace(copies[0], streams=streams)
