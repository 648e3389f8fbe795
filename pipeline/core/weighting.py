"""From answer log-likelihoods to importance weights: the E-step's arithmetic, pure and exact (float64).

For a question with trajectories z_1..z_K and l_k = log p(y | x, z_k), the *sum* of the gold answer's token
log-probabilities (EXSEARCH, Eq. 5 and Algorithm 1):

    likelihood         w_k = exp(l_k / tau)
    posterior          w_k = exp(l_k / tau) / (epsilon + sum_j exp(l_j / tau))
    length_normalised  w_k = exp(l_k / (tau |y|)), optionally divided by the sum over the question
    reward             w_k = metric of the trajectory's own answer, in [0, 1]
    uniform            w_k = 1 / K

With `correct_proposal` every w_k is multiplied by the clipped ratio r_k = min(p(z_k) / q(z_k), max_ratio); where the
weights are divided by their sum, r_k stands in the sum too (self-normalised importance sampling).

K counts the trajectories that take part: infrastructure failures are excluded before they come here. Of the first two,
a higher likelihood never gets a lower weight. Sums run over one question, never over a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.config import WeightingConfig

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """One trajectory's likelihood of the gold answer.

    `log_likelihood` is the sum over the `num_tokens` tokens of the best of several gold answers; `correct` says whether
    the trajectory's own answer matches a gold one exactly, `reward` is the configured metric of it in [0, 1];
    `log_ratio` is sum log p(z) - log q(z) over the tokens that were sampled.
    """

    log_likelihood: float
    num_tokens: int
    correct: bool = False
    reward: float = 0.0
    log_ratio: float = 0.0


def best_answer(log_likelihoods: Sequence[float]) -> int:
    """Index of the gold answer that counts: the most likely one (the first of equals).

    Raises:
        ValueError: there is none.
    """
    if not log_likelihoods:
        raise ValueError("a question without answers cannot be scored")
    return int(np.argmax(np.asarray(log_likelihoods, dtype=np.float64)))


def importance_weights(scored: Sequence[Scored], config: WeightingConfig) -> Array:
    """w(z_k) of one question's trajectories.

    Returns:
        float64 [K], each >= 0.

    Raises:
        ValueError: no trajectories, or a log-likelihood that is positive or not a number.
    """
    if not scored:
        raise ValueError("a question without trajectories has no weights")
    log_likelihoods = np.array([s.log_likelihood for s in scored], dtype=np.float64)
    if np.isnan(log_likelihoods).any() or (log_likelihoods > 1e-4).any():
        raise ValueError(f"log-likelihoods must be at most 0, got {log_likelihoods.tolist()}")
    log_ratios = np.zeros(len(scored))
    if config.correct_proposal:
        log_ratios = np.minimum([s.log_ratio for s in scored], np.log(config.max_ratio))
    weights = _WEIGHTINGS[config.method](scored, np.minimum(log_likelihoods, 0.0), log_ratios, config)
    return weights if config.max_weight is None else np.minimum(weights, config.max_weight)


def effective_sample_size(weights: Array) -> float:
    """(sum w)^2 / sum w^2 of one question: K for equal weights, 1 if one carries all, 0 if all are zero."""
    # Scaled by the largest weight first, so that the squares of tiny likelihoods do not vanish.
    top = weights.max(initial=0.0)
    if top == 0.0:
        return 0.0
    scaled = weights / top
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def log_mean_likelihood(log_likelihoods: Array) -> float:
    """log (1/K) sum_k p(y|x,z_k): one question's term of the likelihood bound."""
    return float(np.logaddexp.reduce(log_likelihoods) - np.log(len(log_likelihoods)))


@dataclass(frozen=True, slots=True)
class WeightingSummary:
    """What an E-step says about the model that sampled it.

    `likelihood_bound` is the mean over questions of log (1/K) sum_k p(y|x,z_k), `likelihood_bound_stderr` its standard
    error; `effective_sample_size` the mean over questions; `all_failed_share` the percentage of questions of which no
    trajectory's own answer was right.
    """

    questions: int
    likelihood_bound: float
    likelihood_bound_stderr: float
    effective_sample_size: float
    all_failed_share: float
    mean_weight: float


def summarise(groups: Sequence[Sequence[Scored]], weights: Sequence[Array]) -> WeightingSummary:
    """Summary over questions; each element of both sequences holds one question's trajectories.

    Raises:
        ValueError: no questions, or the two sequences do not fit.
    """
    if not groups or len(groups) != len(weights):
        raise ValueError(f"cannot summarise {len(groups)} questions with {len(weights)} sets of weights")
    bounds = np.array([log_mean_likelihood(np.array([s.log_likelihood for s in group])) for group in groups])
    return WeightingSummary(
        questions=len(groups),
        likelihood_bound=float(bounds.mean()),
        likelihood_bound_stderr=float(bounds.std(ddof=1) / np.sqrt(len(bounds))) if len(bounds) > 1 else 0.0,
        effective_sample_size=float(np.mean([effective_sample_size(w) for w in weights])),
        all_failed_share=100.0 * float(np.mean([not any(s.correct for s in group) for group in groups])),
        mean_weight=float(np.mean(np.concatenate(list(weights)))),
    )


def _likelihood(
    scored: Sequence[Scored], log_likelihoods: Array, log_ratios: Array, config: WeightingConfig
) -> Array:
    return np.asarray(np.exp(log_likelihoods / config.temperature + log_ratios))


def _posterior(
    scored: Sequence[Scored], log_likelihoods: Array, log_ratios: Array, config: WeightingConfig
) -> Array:
    tempered = log_likelihoods / config.temperature + log_ratios
    log_total = np.logaddexp.reduce(tempered)
    if np.isneginf(log_total):
        return np.zeros(len(tempered))
    if config.floor > 0:
        log_total = np.logaddexp(log_total, np.log(config.floor))
    return np.asarray(np.exp(tempered - log_total))


def _length_normalised(
    scored: Sequence[Scored], log_likelihoods: Array, log_ratios: Array, config: WeightingConfig
) -> Array:
    lengths = np.array([s.num_tokens for s in scored], dtype=np.float64)
    tempered = log_likelihoods / (lengths * config.temperature) + log_ratios
    if config.self_normalised and not np.isneginf(tempered).all():
        tempered = tempered - np.logaddexp.reduce(tempered)
    return np.asarray(np.exp(tempered))


def _reward(
    scored: Sequence[Scored], log_likelihoods: Array, log_ratios: Array, config: WeightingConfig
) -> Array:
    return np.asarray([s.reward for s in scored] * np.exp(log_ratios))


def _uniform(
    scored: Sequence[Scored], log_likelihoods: Array, log_ratios: Array, config: WeightingConfig
) -> Array:
    return np.asarray(np.exp(log_ratios) / len(scored))


_WEIGHTINGS = {
    "likelihood": _likelihood,
    "posterior": _posterior,
    "length_normalised": _length_normalised,
    "reward": _reward,
    "uniform": _uniform,
}
