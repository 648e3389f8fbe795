"""Whether two models differ: tests on scores of the same questions, and how sure it is which of several is the best.

Scores of the same questions are paired: what makes a question hard for one model makes it hard for the other, and
cancels in the difference. Shares (EM, accuracy) are compared by McNemar's exact test and have Newcombe's interval;
means of other scores (F1, recall) by a bootstrap over the questions.

Sources: McNemar, Psychometrika 12 (1947), exact as in Fagerland, Lydersen and Laake, Statistical Analysis of
Contingency Tables (2017), chapter 8; Newcombe, Statistics in Medicine 17 (1998) 2635, method 10; Efron and Tibshirani,
An Introduction to the Bootstrap (1993), chapters 13 and 15.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.core.scoring.intervals import Interval, wilson

Array = npt.NDArray[np.float64]
Test = Literal["mcnemar", "bootstrap"]

_AT_ONCE = 1 << 18
"""Questions that are drawn together."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean scores of two models on the same n questions, in [0, 1], and their difference, b - a.

    `gained` counts the questions on which b scores higher, `lost` those on which a does. `interval` (95 %) and
    `p_value` (two-sided) are None where a bootstrap was to tell and had no samples.
    """

    n: int
    a: float
    b: float
    gained: int
    lost: int
    interval: Interval | None
    p_value: float | None
    test: Test

    @property
    def difference(self) -> float:
        return self.b - self.a

    def in_percent(self) -> dict[str, Any]:
        """Ready for JSON: scores, their difference and its interval in percent."""
        return {
            "n": self.n,
            "a": 100.0 * self.a,
            "b": 100.0 * self.b,
            "difference": 100.0 * self.difference,
            "interval": None if self.interval is None else [100.0 * bound for bound in self.interval],
            "p_value": self.p_value,
            "gained": self.gained,
            "lost": self.lost,
            "test": self.test,
        }


def compare_shares(a: Sequence[float] | Array, b: Sequence[float] | Array) -> Comparison:
    """Of scores that are 0 or 1, by question.

    Raises:
        ValueError: no questions, or not the same number of scores.
    """
    a, b = _pair(a, b)
    gained, lost = int(np.sum(b > a)), int(np.sum(a > b))
    both = int(np.sum((a == 1) & (b == 1)))
    return Comparison(
        len(a),
        float(a.mean()),
        float(b.mean()),
        gained,
        lost,
        newcombe(both, lost, gained, len(a) - both - gained - lost),
        mcnemar(gained, lost),
        "mcnemar",
    )


def compare_means(
    a: Sequence[float] | Array, b: Sequence[float] | Array, samples: int, seed: int
) -> Comparison:
    """Of scores in [0, 1], by question; `samples` resamples, none: no interval and no p-value.

    Raises:
        ValueError: no questions, or not the same number of scores.
    """
    a, b = _pair(a, b)
    interval, p_value = paired_bootstrap(b - a, samples, seed) if samples else (None, None)
    means = float(a.mean()), float(b.mean())
    return Comparison(len(a), *means, int(np.sum(b > a)), int(np.sum(a > b)), interval, p_value, "bootstrap")


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: questions that only one of two models answers are as likely to be the
    one's as the other's, if the models are equally good. 1 if there are none.
    """
    n, fewer = gained + lost, min(gained, lost)
    term = tail = 1  # of whole numbers: exact, however many questions there are
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n))


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """95 % interval of the difference of two paired shares, b - a: Wilson's intervals of both, squared and added, with
    the correlation of the pairs taken off (Newcombe's method 10). No point where no question differs.

    Args:
        both, only_a, only_b, neither: how many questions are right under both models, one, none; not all 0.
    """
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    share_a, share_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)
    phi = _correlation(both, only_a, only_b, neither)

    def half(of_b: float, of_a: float) -> float:
        return math.sqrt(max(0.0, of_b**2 - 2 * phi * of_b * of_a + of_a**2))

    difference = share_b - share_a
    low = difference - half(share_b - low_b, high_a - share_a)
    high = difference + half(high_b - share_b, share_a - low_a)
    return max(-1.0, low), min(1.0, high)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's: with a continuity correction where it is positive."""
    n = both + only_a + only_b + neither
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if product == 0:
        return 0.0
    found = both * neither - only_a * only_b
    return (max(found - n / 2, 0.0) if found > 0 else found) / math.sqrt(product)


def paired_bootstrap(differences: Sequence[float] | Array, samples: int, seed: int) -> tuple[Interval, float]:
    """95 % percentile interval of the mean difference, in [-1, 1], and the two-sided p-value of its being 0: twice the
    share of the resamples whose mean is not on the side of the mean, itself counted in.

    See `judged_differences` for what resampling cannot find.
    """
    values = np.asarray(differences, dtype=np.float64)
    return judged_differences(values, resampled_means(values[np.newaxis], samples, seed)[:, 0])


def judged_differences(values: Array, means: Array) -> tuple[Interval, float]:
    """`judged`, of resampled means of differences in [-1, 1], but for two things that no resample shows.

    Where all differences are the same the interval is as wide as if some questions were otherwise: as many as may be
    where none was seen (Wilson). And p is never below what a sign test gives of the m questions that differ if all are
    of one sign, 2 / 2^m: of few questions there is nothing that a resample could do otherwise.

    Args:
        values: the differences by question.
    """
    (low, high), p = judged(means)
    if np.ptp(values) == 0:
        wide, value = wilson(0, len(values))[1], float(values[0])
        low, high = value - wide * (1 + value), value + wide * (1 - value)
    return (low, high), max(p, min(1.0, 2.0 * 0.5 ** int(np.count_nonzero(values))))


def judged(means: Array) -> tuple[Interval, float]:
    """95 % percentile interval of resampled means, and the p-value of a true mean of 0: twice the smaller share of them
    on one side of 0 (those at 0 are on both), the sample itself counted in."""
    low, high = np.percentile(means, [2.5, 97.5])
    one_side = min(int(np.sum(means <= 0)), int(np.sum(means >= 0)))
    return (float(low), float(high)), min(1.0, 2 * (1 + one_side) / (1 + len(means)))


def probabilities_of_best(scores: Array, samples: int, seed: int) -> Array:
    """How often each model would be chosen as the best, the earliest of equals, if the questions were drawn again.

    Args:
        scores: [models, questions].

    Returns:
        float64 [models], sums to 1.
    """
    best = resampled_means(scores, samples, seed).argmax(axis=1)
    return np.bincount(best, minlength=len(scores)) / samples


def resampled_means(scores: Array, samples: int, seed: int) -> Array:
    """Means over the questions drawn with replacement; every row of a resample over the same draw.

    Args:
        scores: [rows, questions].

    Returns:
        float64 [samples, rows].
    """
    rng, n = np.random.default_rng(seed), scores.shape[1]
    at_once = max(1, _AT_ONCE // n)
    sizes = [min(at_once, samples - first) for first in range(0, samples, at_once)]
    draws = (rng.integers(0, n, (size, n)) for size in sizes)
    return np.concatenate([np.stack([row[drawn].mean(axis=1) for row in scores], axis=1) for drawn in draws])


@dataclass(frozen=True, slots=True)
class PairedMean:
    """Mean of the differences of n pairs of numbers, and its standard error: sd / sqrt(n), 0 of a single pair.

    `left_out` counts the pairs of which a number is not finite.
    """

    n: int
    difference: float
    stderr: float
    left_out: int


def paired_mean(before: Sequence[float] | Array, after: Sequence[float] | Array) -> PairedMean | None:
    """Of after - before. None if no pair is finite.

    Raises:
        ValueError: not as many numbers after as before.
    """
    a, b = _pair(before, after) if len(before) or len(after) else (np.zeros(0), np.zeros(0))
    finite = np.isfinite(a) & np.isfinite(b)
    differences = b[finite] - a[finite]
    if not len(differences):
        return None
    n = len(differences)
    stderr = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return PairedMean(n, float(differences.mean()), stderr, len(a) - n)


def trimmed_mean(values: Sequence[float] | Array, share: float = 0.1) -> float:
    """Mean without this share of the values at either end, rounded down."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    cut = int(share * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean())


def _pair(a: Sequence[float] | Array, b: Sequence[float] | Array) -> tuple[Array, Array]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} scores are no pairs")
    return first, second
