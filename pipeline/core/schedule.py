"""The learning rate of one M-step: a pure function, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate_at(
    step: int, num_steps: int, *, peak: float, warmup_ratio: float, min_ratio: float
) -> float:
    """Learning rate of optimiser step `step` (from 0) of `num_steps`: linear warm-up, then half a cosine.

    The first step has a positive rate already, the last warm-up step has the peak, and the cosine would reach
    `min_ratio * peak` one step after the last.
    """
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
