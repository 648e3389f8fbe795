"""From the episodes of one task to weighted examples: what a recipe tells the weighting actor to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline.core.agents.program import Task
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import AgentConfig, WeightingConfig
from pipeline.core.errors import RunError
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Episode, Example, Question, StopReason, Trajectory, count_stop_reasons
from pipeline.core.renderer import Renderer
from pipeline.core.scoring.answers import ProtocolName, score_answer
from pipeline.core.weighting import Scored, best_answer, importance_weights, summarise

TaskT = TypeVar("TaskT", bound=Task, contravariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """What became of one task.

    `examples` holds the training examples by output, the name of whom they train; `statistics` is plain data (JSON),
    written beside the shard that the task is in.
    """

    examples: Mapping[str, Sequence[Example]]
    statistics: Mapping[str, Any]


class Weigh(Protocol[TaskT]):
    """Arithmetic on one task's episodes; picklable. It sees all of them, failed ones too, in the order of the
    samples."""

    @property
    def outputs(self) -> Sequence[str]:
        """The names under which it gives examples."""

    def __call__(self, task: TaskT, episodes: Sequence[Episode]) -> Weighted: ...

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Figures of a whole phase from the statistics of its tasks, in the order of the tasks.

        Raises:
            RuntimeError: nothing can be trained on.
        """
        ...


@dataclass(frozen=True, slots=True)
class NothingToTrainOn:
    """For episodes that are only looked at."""

    outputs: Sequence[str] = ()

    def __call__(self, task: Task, episodes: Sequence[Episode]) -> Weighted:
        return Weighted({}, {})

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class SearchWeights:
    """ExSearch's E-step: w(z) from log p(y | x, z), and the trajectory with the gold answer in place as the example."""

    weighting: WeightingConfig
    agent: AgentConfig
    tokenizer: str
    """Model directory or hub name."""
    protocol: ProtocolName = "exsearch"
    """By whose rules a trajectory's own answer is scored."""

    outputs = (SEARCHER,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        renderer = renderer_at(self.tokenizer, self.agent)
        trajectories = [episode.turn(SEARCHER) for episode in episodes]
        usable = [t for t in trajectories if not t.stop_reason.is_infrastructure]
        scorable = [t for t in usable if not np.isnan(t.log_likelihoods).all()]
        golds = [best_gold(trajectory, task) for trajectory in scorable]
        scored = [
            self._scored(trajectory, task, log_likelihood, len(renderer.answer_ids(answer)))
            for trajectory, (answer, log_likelihood) in zip(scorable, golds, strict=True)
        ]
        weights = importance_weights(scored, self.weighting) if scored else np.zeros(0)
        examples = [
            renderer.with_gold_answer(trajectory, answer, float(weight))
            for trajectory, (answer, _), weight in zip(scorable, golds, weights, strict=True)
        ]
        return Weighted(
            {SEARCHER: examples},
            {
                "scored": [asdict(one) for one in scored],
                "weights": weights.tolist(),
                "stop_reasons": count_stop_reasons(trajectories),
                "too_long_to_score": len(usable) - len(scorable),
            },
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return summarise_scored(statistics)

    def _scored(
        self, trajectory: Trajectory, question: Question, log_likelihood: float, num_tokens: int
    ) -> Scored:
        own = score_answer(trajectory.answer, question.answers, self.protocol)
        return Scored(
            log_likelihood=log_likelihood,
            num_tokens=num_tokens,
            correct=own.em == 1.0,
            reward=getattr(own, self.weighting.reward),
            log_ratio=log_ratio(trajectory) if self.weighting.correct_proposal else 0.0,
        )


def summarise_scored(statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """`WeightingSummary`, how trajectories stopped and how many were excluded.

    Args:
        statistics: of each task `scored` (`Scored` as plain data), `weights`, `stop_reasons` and `too_long_to_score`.

    Raises:
        RuntimeError: nothing was weighted.
    """
    stop_reasons: Counter[str] = Counter()
    for row in statistics:
        stop_reasons.update(row["stop_reasons"])
    with_weights = [row for row in statistics if row["scored"]]
    if not with_weights:
        raise RunError(f"no trajectory could be weighted; how they stopped: {dict(stop_reasons)}")
    summary = summarise(
        [[_from_json(one) for one in row["scored"]] for row in with_weights],
        [np.array(row["weights"]) for row in with_weights],
    )
    too_long = sum(row["too_long_to_score"] for row in statistics)
    infrastructure = sum(stop_reasons[reason] for reason in StopReason if reason.is_infrastructure)
    return asdict(summary) | {
        "excluded": infrastructure + too_long,
        "excluded_too_long_to_score": too_long,
        "stop_reasons": dict(stop_reasons),
    }


def log_ratio(trajectory: Trajectory) -> float:
    """sum log p(z) - log q(z) over the sampled tokens in front of the answer; 0 where q is p."""
    if trajectory.proposal_logprobs is None:
        return 0.0
    sampled = np.flatnonzero(trajectory.loss_mask[: trajectory.answer_start])
    log_p, log_q = trajectory.logprobs[sampled], trajectory.proposal_logprobs[sampled]
    return float((log_p.astype(np.float64) - log_q).sum())


def best_gold(trajectory: Trajectory, question: Question) -> tuple[str, float]:
    """The gold answer that counts and its log-likelihood."""
    fits = [
        (a, v) for a, v in zip(question.distinct_answers, trajectory.log_likelihoods, strict=True) if v == v
    ]
    return fits[best_answer([value for _, value in fits])]


def _from_json(row: Mapping[str, Any]) -> Scored:
    """JSON has no infinity: null is the likelihood of an impossible answer."""
    return (
        Scored(**row) if row["log_likelihood"] is not None else Scored(**{**row, "log_likelihood": -np.inf})
    )


@lru_cache(maxsize=4)
def renderer_at(tokenizer: str, agent: AgentConfig) -> Renderer:
    """The renderer of a model directory's tokenizer."""
    return Renderer(load_tokenizer(tokenizer), agent)
