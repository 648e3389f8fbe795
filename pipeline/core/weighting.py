"""From answer log-likelihoods to importance weights: the E-step's arithmetic, pure and exact (float64).

Weights are logarithms until the loss divides them by their sum over the iteration: exp(l) of a long answer is no number
that a computer can hold.

For a question with trajectories z_1..z_K and l_k = log p(Y | x, z_k), where p(Y | x, z) = sum_{y in Y} p(y | x, z) over
the different gold answers and log p(y | x, z) is the *sum* of an answer's token log-probabilities (EXSEARCH, Eq. 5 and
Algorithm 1):

    likelihood         log w_k = l_k / tau
    posterior          log w_k = l_k / tau - log(epsilon + sum_j exp(l_j / tau))
    length_normalised  log w_k = max_y log p(y | x, z_k) / (tau |y|), optionally less log of the sum over the question
    reward             log w_k = log of the metric r_k of the trajectory's own answer, which is in [0, 1], or of what a
                       function of the user's gives it, which is at least 0; optionally less log of the sum over the
                       question
    uniform            log w_k = -log K

With `subtract_baseline` exp(l_k / tau) of the first two becomes max(0, exp(l_k / tau) - exp(b / tau)), where b is
log p(Y | x) of the answer in front of the first turn: what is guessed right without searching earns nothing.

With `correct_proposal` log r_k is added, r_k = min(p(z_k) / q(z_k), max_ratio); where the weights are divided by their
sum, r_k stands in the sum too (self-normalised importance sampling).

What is trained behind a trajectory is the gold answer that is most likely there (per token for `length_normalised`).
With `reward` it is the trajectory's own answer, which is sampled too: the expected metric is over both, and z_k above
stands for both.

Rewards over their sum are the mean-normalised ones of MaxRL (Tajwar et al. 2026), for the gradient of log p(success|x):
a question without success has no say.

With `credit: turn` each turn of a trajectory has a weight of its own. Let q_i = exp(log p(Y | x, z_{1..i}) / tau) be
how likely the answer is if one is demanded behind turn i, and q_T that of the whole trajectory, exp(l_k / tau). The
gain of turn i is q_i - q_{i-1}; its credit is that and what comes of it:

    A_i = sum_{j >= i} lambda^(j - i) (q_j - q_{j-1}),        log w_{k,i} = log max(0, A_i) + log r_k - log D

D is the divisor of the trajectory's own weight: 1 for `likelihood`, epsilon + the sum of its terms for `posterior`. The
gains of a trajectory sum to q_T - q_0, the whole less its baseline: with lambda 0 the credits do, with lambda 1 the
first credit is that. It is generalised advantage estimation (Schulman et al. 2016, equation 16, with gamma 1), the
value of a state being how likely an answer is now; IGPO (Wang et al. 2025) takes such gains as rewards.

Why so: with lambda 1, A_i = q_T - q_{i-1} is the return less a baseline that does not depend on the turn. Before they
are cut at 0 such weights estimate the gradient of sum_x p(Y | x), as `likelihood` does, without bias and with less
variance. Cut at 0 they imitate only what did better than was to be expected (self-imitation, Oh et al. 2018): they stay
in [0, 1], and a weighted likelihood stays one. Gains of log p would not do: exp(l_k - b) of one hard question outweighs
all others. The answer itself is given and not sampled, so it has no baseline and keeps w_k.

`posterior` divides by what all trajectories of a question came to in the end, and a turn on the way may be worth more
than that, where a later one lost it again: there the weights of turns are cut at 1.

K counts the trajectories that take part: infrastructure failures are excluded before they come here. A question that
has c times as many as it would have without `em.further_samples` counts no more for it: its weights are divided by c,
unless they are divided by their sum. Of the first two methods a higher likelihood never gets a lower weight. Sums run
over one question, never over a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.config import WeightingConfig
from pipeline.core.scoring.paired import trimmed_mean

Array = npt.NDArray[np.float64]

_ROUNDING = 1e-4
"""By which a sum of log-probabilities may lie above 0."""


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold answer behind a trajectory: `log_likelihood` is the sum over its `num_tokens` tokens."""

    log_likelihood: float
    num_tokens: int

    @property
    def per_token(self) -> float:
        return self.log_likelihood / self.num_tokens


@dataclass(frozen=True, slots=True)
class Scored:
    """One trajectory's likelihood of the gold answers.

    `log_likelihood` is that of their set; `per_token` the mean over the tokens of the one that has the highest;
    `correct` says whether the trajectory's own answer matches a gold one exactly, `reward` is the configured reward,
    at least 0; `log_ratio` is sum log p - log q over the tokens that were sampled (module docstring); `before` is the
    likelihood of the same set in front of each turn, of as many of these as were scored; `further` says that it was
    sampled because of what others came to (`em.further_samples`).
    """

    log_likelihood: float
    per_token: float
    correct: bool = False
    reward: float = 0.0
    log_ratio: float = 0.0
    before: tuple[float, ...] = ()
    further: bool = False

    @classmethod
    def of(
        cls,
        golds: Sequence[Gold],
        *,
        correct: bool = False,
        reward: float = 0.0,
        log_ratio: float = 0.0,
        before: tuple[float, ...] = (),
        further: bool = False,
    ) -> Scored:
        """
        Raises:
            ValueError: there is no gold answer.
        """
        if not golds:
            raise ValueError("a question without answers cannot be scored")
        return cls(
            # Engines round every answer for itself, so the sum over several can come out above 1.
            log_likelihood=min(log_sum([gold.log_likelihood for gold in golds]), _ROUNDING),
            per_token=max(gold.per_token for gold in golds),
            correct=correct,
            reward=reward,
            log_ratio=log_ratio,
            before=before,
            further=further,
        )

    @property
    def baseline(self) -> float:
        """log p(Y | x) without any turn. A trajectory without turns is that."""
        return self.before[0] if self.before else self.log_likelihood


def log_sum(values: Sequence[float] | Array) -> float:
    """log sum_k exp(v_k): of the log-likelihoods of different answers that of their set. -inf of nothing."""
    return float(np.logaddexp.reduce(np.asarray(values, dtype=np.float64), initial=-np.inf))


def log_mean(values: Sequence[float] | Array) -> float:
    """log (1/K) sum_k exp(v_k)."""
    return log_sum(values) - float(np.log(len(values)))


def trained_gold(golds: Mapping[str, Gold], config: WeightingConfig) -> str:
    """The gold answer that is trained behind the trajectory: the most likely one, the first of equals."""
    if config.method == "length_normalised":
        return max(golds, key=lambda answer: golds[answer].per_token)
    return max(golds, key=lambda answer: golds[answer].log_likelihood)


def log_weights(scored: Sequence[Scored], config: WeightingConfig) -> Array:
    """log w(z_k) of one question's trajectories.

    Returns:
        float64 [K]; -inf for a weight of zero.

    Raises:
        ValueError: no trajectories, or a log-likelihood that is positive or not a number.
    """
    found, log_divisor = _undivided(scored, config)
    return _clipped(found if np.isneginf(log_divisor) else found - log_divisor, config)


def turn_log_weights(scored: Sequence[Scored], config: WeightingConfig) -> list[Array]:
    """log w_{k,i} of each turn of one question's trajectories (`credit: turn`; module docstring).

    Returns:
        for each trajectory float64 [T], as many as it has values in front of turns; -inf for a weight of zero.

    Raises:
        ValueError: as `log_weights`.
    """
    _, log_divisor = _undivided(scored, config)
    weights = []
    for one in scored:
        values = np.minimum([*one.before, one.log_likelihood], 0.0) / config.temperature
        credits, log_unit = turn_credits(values, config.credit_decay)
        if np.isneginf(log_divisor):  # nothing of the question has a say
            credits = np.zeros_like(credits)
        found = _log(np.maximum(credits, 0.0)) + log_unit + _log_ratio(one, config)
        if not np.isneginf(log_divisor):
            found = found - log_divisor
        weights.append(_clipped(np.minimum(found, 0.0) if config.method == "posterior" else found, config))
    return weights


def turn_credits(values: Array, decay: float) -> tuple[Array, float]:
    """Credit of each turn of a trajectory, A_i of the module docstring.

    Args:
        values: [T + 1], log q_0 .. log q_T.
        decay: lambda.

    Returns:
        A_1 .. A_T [T] in units of the largest q, and the logarithm of that.
    """
    log_unit = float(values.max())
    if np.isneginf(log_unit):
        return np.zeros(len(values) - 1), 0.0
    credits = np.diff(np.exp(values - log_unit))
    for i in reversed(range(len(credits) - 1)):
        credits[i] += decay * credits[i + 1]
    return credits, log_unit


def _undivided(scored: Sequence[Scored], config: WeightingConfig) -> tuple[Array, float]:
    """log w [K] before they are divided, and the logarithm of what by; minus infinity where all weights are zero.

    Raises:
        ValueError: as `log_weights`.
    """
    if not scored:
        raise ValueError("a question without trajectories has no weights")
    log_likelihoods = np.array([[s.log_likelihood, s.per_token] for s in scored], dtype=np.float64)
    if np.isnan(log_likelihoods).any() or (log_likelihoods > _ROUNDING).any():
        raise ValueError(f"log-likelihoods must be at most 0, got {log_likelihoods.tolist()}")
    of_set, per_token = np.minimum(log_likelihoods, 0.0).T
    log_ratios = np.array([_log_ratio(one, config) for one in scored])
    match config.method:
        case "likelihood" | "posterior":
            found = of_set / config.temperature
            if config.subtract_baseline:
                baselines = np.minimum([s.baseline for s in scored], 0.0) / config.temperature
                found = _log_difference(found, baselines)
            found = found + log_ratios
            if config.method == "posterior":
                return found, log_sum([*found, np.log(config.floor)] if config.floor > 0 else found)
        case "length_normalised":
            found = per_token / config.temperature + log_ratios
        case "reward":
            found = _log(np.array([s.reward for s in scored])) + log_ratios
        case "uniform":
            return log_ratios, float(np.log(len(scored)))
    if config.self_normalised:
        return found, log_sum(found)
    first = sum(not one.further for one in scored)
    return found, float(np.log(len(scored) / max(1, first)))


def _log(values: Array) -> Array:
    """Of numbers that are at least 0; -inf of 0."""
    return np.log(values, out=np.full_like(values, -np.inf), where=values > 0)


def _log_difference(larger: Array, smaller: Array) -> Array:
    """log max(0, exp(larger) - exp(smaller))."""
    differs = larger > smaller
    gaps = np.subtract(smaller, larger, out=np.zeros_like(larger), where=differs)
    return np.where(differs, larger, 0.0) + _log(-np.expm1(gaps))


def _clipped(logs: Array, config: WeightingConfig) -> Array:
    return np.asarray(np.minimum(logs, np.inf if config.max_weight is None else np.log(config.max_weight)))


def _log_ratio(scored: Scored, config: WeightingConfig) -> float:
    """log r_k."""
    return min(scored.log_ratio, float(np.log(config.max_ratio))) if config.correct_proposal else 0.0


def effective_sample_size(logs: Array) -> float:
    """(sum w)^2 / sum w^2 of one question, from log w: K for equal weights, 1 if one carries all, 0 if all are zero."""
    total = log_sum(logs)
    return 0.0 if np.isneginf(total) else float(np.exp(2 * total - log_sum(2 * logs)))


def bound_of(scored: Sequence[Scored], config: WeightingConfig) -> float:
    """log (1/K) sum_k r_k p(Y|x,z_k): one question's term of the likelihood bound.

    Without `further` ones, as long as there are others: with them the mean would be too high.

    Its mean over samples is at most log p(Y|x), also from another proposal than the model: clipping makes r_k smaller.
    r_k is 1 without `correct_proposal`.
    """
    first = [one for one in scored if not one.further] or scored
    return log_mean([s.log_likelihood + _log_ratio(s, config) for s in first])


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """The ratios p / q of an E-step's trajectories, with `correct_proposal`.

    `mean` is theirs before they are clipped: 1 where q covers what p samples, less where truncation leaves out a part
    of it, and unsure where few trajectories carry it. `mean_clipped` is that of r_k, `clipped_share` the percentage of
    trajectories whose ratio is above `max_ratio`, `effective_sample_size` that of r_k over all of them.
    """

    trajectories: int
    mean: float
    mean_clipped: float
    clipped_share: float
    effective_sample_size: float


@dataclass(frozen=True, slots=True)
class WeightingSummary:
    """What an E-step says about the model that sampled it.

    `likelihood_bound` is the mean over questions of `bound_of`, -inf where one of them finds its answers impossible;
    `likelihood_bound_stderr` its standard error. A few questions may make up most of it, so beside it stand their
    median, and their mean without the highest and the lowest tenth. `mean_likelihood` is the mean over questions of
    the estimate (1/K) sum_k r_k p(Y|x,z_k) of p(Y|x), `median_likelihood` their median. `effective_sample_size` is the
    mean over questions with weights; `global_effective_sample_size` that of all `weighted_trajectories` together, which
    the M-step divides by one sum. `all_failed_share` is the percentage of questions of which no trajectory's own answer
    was right.
    """

    questions: int
    likelihood_bound: float
    likelihood_bound_stderr: float
    likelihood_bound_median: float
    likelihood_bound_trimmed: float
    mean_likelihood: float
    mean_likelihood_stderr: float
    median_likelihood: float
    effective_sample_size: float
    global_effective_sample_size: float
    weighted_trajectories: int
    all_failed_share: float
    mean_weight: float
    proposal_ratio: RatioSummary | None


def summarise(
    groups: Sequence[Sequence[Scored]], weights: Sequence[Array | None], config: WeightingConfig
) -> WeightingSummary:
    """Summary over questions; each element of the first two sequences holds one question's trajectories.

    Args:
        weights: log w; None for a question that got none.

    Raises:
        ValueError: no questions, none with weights, or the two sequences do not fit.
    """
    weighted = [logs for logs in weights if logs is not None]
    if len(groups) != len(weights) or not weighted:
        raise ValueError(f"cannot summarise {len(groups)} questions with {len(weighted)} sets of weights")
    bounds = np.array([bound_of(group, config) for group in groups])
    likelihoods, together = np.exp(bounds), np.concatenate(weighted)
    return WeightingSummary(
        questions=len(groups),
        likelihood_bound=float(bounds.mean()),
        likelihood_bound_stderr=_stderr(bounds),
        likelihood_bound_median=float(np.median(bounds)),
        likelihood_bound_trimmed=trimmed_mean(bounds),
        mean_likelihood=float(likelihoods.mean()),
        mean_likelihood_stderr=_stderr(likelihoods),
        median_likelihood=float(np.median(likelihoods)),
        effective_sample_size=float(np.mean([effective_sample_size(logs) for logs in weighted])),
        global_effective_sample_size=effective_sample_size(together),
        weighted_trajectories=len(together),
        all_failed_share=100.0 * float(np.mean([not any(s.correct for s in group) for group in groups])),
        mean_weight=float(np.exp(log_mean(together))),
        proposal_ratio=_ratios(groups, config) if config.correct_proposal else None,
    )


def _stderr(values: Array) -> float:
    """Of their mean; 0 of one value, and where one is not finite."""
    has_spread = len(values) > 1 and np.isfinite(values).all()
    return float(values.std(ddof=1) / np.sqrt(len(values))) if has_spread else 0.0


def _ratios(groups: Sequence[Sequence[Scored]], config: WeightingConfig) -> RatioSummary:
    every = [scored for group in groups for scored in group]
    ratios = np.array([scored.log_ratio for scored in every])
    clipped = np.array([_log_ratio(scored, config) for scored in every])
    with np.errstate(over="ignore"):  # a ratio may be larger than any number
        mean = float(np.exp(log_mean(ratios)))
    return RatioSummary(
        trajectories=len(every),
        mean=mean,
        mean_clipped=float(np.exp(log_mean(clipped))),
        clipped_share=100.0 * float(np.mean(ratios > clipped)),
        effective_sample_size=effective_sample_size(clipped),
    )
