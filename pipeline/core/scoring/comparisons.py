"""How sure a difference is: scores of the same questions under several seeds, resampled by question and by seed.

Sources: Efron and Tibshirani (1993), chapter 13, for the percentile interval; Owen (2007), "The pigeonhole bootstrap",
for tables whose rows and columns are both drawn; Holm (1979) for many comparisons at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.scoring.intervals import wilson
from pipeline.core.scoring.paired import judged, judged_differences

Scores = Mapping[str, float]
"""A score in [0, 1] by question id."""
Table = npt.NDArray[np.float64]
"""[S seeds, Q questions] of scores, or of their differences."""

SAMPLES = 10_000
_BLOCK = 2**22
"""Values that are held in memory at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval [low, high], and p: how well a true mean of 0 goes with the values, two-sided."""

    mean: float
    low: float
    high: float
    p: float


def common_scores(runs: Sequence[Scores]) -> tuple[list[str], Table]:
    """The ids that all runs have, in the order of the first, and the table of their scores."""
    ids = [id_ for id_ in runs[0] if all(id_ in run for run in runs[1:])]
    return ids, np.array([[run[id_] for id_ in ids] for run in runs], dtype=np.float64)


def score_estimate(scores: Table) -> Estimate:
    """Mean and interval of scores in [0, 1]; the interval is never narrower than that of questions which all score the
    same (`intervals.bootstrap`)."""
    found, n = bootstrap_table(scores), scores.shape[1]
    return Estimate(found.mean, min(found.low, wilson(n, n)[0]), max(found.high, wilson(0, n)[1]), found.p)


def bootstrap_table(values: Table, *, samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """Percentile bootstrap of the mean of a table [S seeds, Q questions], S and Q at least 1.

    Every resample draws Q questions and S seeds with replacement, a question with its column and a seed with its row:
    what a question has in common under all seeds, and a seed on all questions, is drawn with it. With one seed the
    questions alone are drawn, and the interval says nothing of what another seed would do.

    p is twice the smaller share of resampled means on one side of 0 (those at 0 are on both), at least
    2 / (samples + 1).
    """
    (low, high), p = judged(_resampled_means(values, samples, seed))
    return Estimate(float(values.mean()), low, high, p)


def difference_table(values: Table, *, samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """The same of a table of differences in [-1, 1] between paired scores; see `judged_differences`."""
    means = _resampled_means(values, samples, seed)
    (low, high), p = judged_differences(values.mean(axis=0), means)
    return Estimate(float(values.mean()), low, high, p)


def _resampled_means(values: Table, samples: int, seed: int) -> npt.NDArray[np.float64]:
    num_seeds, num_questions = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, _BLOCK // values.size)
    for begin in range(0, samples, block):
        size = min(block, samples - begin)
        questions = rng.integers(0, num_questions, (size, num_questions))
        seeds = rng.integers(0, num_seeds, (size, num_seeds))
        # Sums of whole numbers are exact, so that no difference is 0 and not almost.
        by_seed = values[:, questions].sum(axis=2).T  # [size, S]
        sums = np.take_along_axis(by_seed, seeds, axis=1).sum(axis=1)
        means[begin : begin + size] = sums / values.size
    return means


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, in their order, each such that all those below a level may be believed
    at that level together: Holm's step-down."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted
