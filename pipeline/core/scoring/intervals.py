"""How sure a mean over questions is: 95 % intervals that are not a point where every question scores the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

_Z = 1.959963984540054  # 97.5 % of a standard normal distribution lie below


def wilson(right: int, n: int) -> Interval:
    """Wilson's score interval of the share `right` of `n`, n > 0; it encloses the share."""
    centre = (right + _Z**2 / 2) / (n + _Z**2)
    half = _Z / (n + _Z**2) * math.sqrt(right * (n - right) / n + _Z**2 / 4)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def bootstrap(scores: Sequence[float], samples: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean of scores in [0, 1], resampling the questions.

    Resampling finds nothing that no question shows. So the interval reaches at least up to where Wilson's of no right
    question ends, and down to where that of right questions alone begins.
    """
    values, rng = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return min(float(low), wilson(n, n)[0]), max(float(high), wilson(0, n)[1])
