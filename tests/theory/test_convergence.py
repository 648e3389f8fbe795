"""How fast K samples approach the exact expectation. Nothing is drawn: all multisets of K samples are added up.

With W = p(y|x,z) / p(y|x), mean 1, and f a function of the trajectory with the posterior mean m = E[W f], the
self-normalised estimate sum_k w_k f(z_k) of m has (delta method)

    bias      = -E[W^2 (f - m)] / K + O(1/K^2)
    variance  =  E[W^2 (f - m)^2] / K + O(1/K^2)

and the bound log (1/K) sum_k p(y|x,z_k) lies Var(W) / 2K + O(1/K^2) below log p(y|x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from pipeline.core.config import WeightingConfig
from pipeline.core.weighting import Gold, Scored, bound_of, effective_sample_size, log_weights

PRIOR = np.array([0.5, 0.3, 0.2])
"""p(z|x) of three trajectories."""
LIKELIHOOD = np.array([0.1, 0.5, 0.8])
"""p(y|x,z)."""
MARGINAL = float(PRIOR @ LIKELIHOOD)
POSTERIOR = PRIOR * LIKELIHOOD / MARGINAL
W = LIKELIHOOD / MARGINAL
SCORED = [Scored.of([Gold(math.log(value), 2)]) for value in LIKELIHOOD]
SIZES = (4, 8, 16, 32)


def draws(size: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All multisets of `size` samples of the prior, as counts per trajectory, with their probabilities."""
    log_prior = np.log(PRIOR)
    for first in range(size + 1):
        for second in range(size - first + 1):
            counts = (first, second, size - first - second)
            ways = math.lgamma(size + 1) - sum(math.lgamma(count + 1) for count in counts)
            yield math.exp(ways + float(np.dot(counts, log_prior))), counts


def samples_of(counts: tuple[int, ...]) -> list[Scored]:
    return [one for one, count in zip(SCORED, counts, strict=True) for _ in range(count)]


@cache
def moments(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bias and mean squared error, per trajectory, of the posterior weights of K samples as an estimate of p(z|x,y)."""
    bias, error = np.zeros(3), np.zeros(3)
    for probability, counts in draws(size):
        weights = np.exp(log_weights(samples_of(counts), WeightingConfig(method="posterior")))
        estimate = np.array([part.sum() for part in np.split(weights, np.cumsum(counts)[:-1])])
        bias += probability * (estimate - POSTERIOR)
        error += probability * (estimate - POSTERIOR) ** 2
    return bias, error


def constants(power: int) -> np.ndarray:
    """E[W^2 (f - m)^power] of each trajectory's indicator f."""
    off = np.eye(3) - POSTERIOR[:, None]
    return np.asarray((PRIOR * W**2 * off**power).sum(axis=1))


@pytest.mark.parametrize(
    ("moment", "limit"), [(0, -constants(1)), (1, constants(2))], ids=["bias", "squared error"]
)
def test_self_normalised_weights_err_by_one_over_k(moment: int, limit: np.ndarray) -> None:
    """K times the bias, and K times the mean squared error, go to their limits, with a rest of order 1/K itself."""
    scaled = [size * moments(size)[moment] for size in SIZES]
    off = [np.abs(value / limit - 1).max() for value in scaled]
    assert all(after < 0.65 * before for before, after in pairwise(off))
    without_rest = 2 * scaled[-1] - scaled[-2]
    assert without_rest == pytest.approx(limit, rel=0.08)


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_likelihood_weights_is_unbiased_at_every_k(size: int) -> None:
    config = WeightingConfig(method="likelihood")
    mean = sum(p * np.exp(log_weights(samples_of(counts), config)).mean() for p, counts in draws(size))
    assert mean == pytest.approx(MARGINAL)


@pytest.mark.parametrize("size", SIZES)
def test_the_bound_is_the_logarithm_of_an_unbiased_estimate(size: int) -> None:
    mean = sum(p * math.exp(bound(counts)) for p, counts in draws(size))
    assert mean == pytest.approx(MARGINAL)


def test_the_bound_rises_to_the_log_likelihood_as_k_grows() -> None:
    """IWAE: E log (1/K) sum_k p(y|x,z_k) is below log p(y|x), never falls with K, and closes the gap as 1/K."""
    gaps = [math.log(MARGINAL) - sum(p * bound(counts) for p, counts in draws(size)) for size in SIZES]
    assert all(before > after > 0 for before, after in pairwise(gaps))
    variance = float(PRIOR @ (W - 1) ** 2)
    assert SIZES[-1] * gaps[-1] == pytest.approx(variance / 2, rel=0.1)


def bound(counts: tuple[int, ...]) -> float:
    return bound_of(samples_of(counts), WeightingConfig())


def test_the_effective_sample_size_of_many_samples_is_their_number_over_the_second_moment_of_the_weight() -> (
    None
):
    """(sum w)^2 / sum w^2 -> K / E[W^2]: so many samples of the posterior itself would say as much."""
    counts = (500, 300, 200)
    logs = log_weights(samples_of(counts), WeightingConfig(method="likelihood"))
    assert effective_sample_size(logs) == pytest.approx(1000 / float(PRIOR @ W**2))
