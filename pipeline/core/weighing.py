"""From the episodes of one task to weighted examples: what a recipe tells the weighting actor to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline.core.agents.program import Task
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import AgentConfig, WeightingConfig
from pipeline.core.copies import merge_copies
from pipeline.core.errors import RunError
from pipeline.core.models import load_tokenizer
from pipeline.core.records import (
    Episode,
    Example,
    Numbers,
    Question,
    StopReason,
    Trajectory,
    count_stop_reasons,
)
from pipeline.core.renderer import Renderer
from pipeline.core.rewards import reward_of
from pipeline.core.scoring.answers import ProtocolName, score_answer
from pipeline.core.turn_credit import with_turn_weights
from pipeline.core.weighting import (
    Array,
    Gold,
    Scored,
    log_sum,
    log_weights,
    summarise,
    trained_gold,
    turn_log_weights,
)

WEIGHTING_REWARD = "weighting.reward"
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
class OnlyFigures:
    """What another one says of a phase, for episodes that are not trained on."""

    weigh: Weigh[Any]

    outputs: Sequence[str] = ()

    def __call__(self, task: Task, episodes: Sequence[Episode]) -> Weighted:
        return Weighted({}, self.weigh(task, episodes).statistics)

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return self.weigh.summarise(statistics)


@dataclass(frozen=True, slots=True, eq=False)
class WithStreams:
    """Examples as another one makes them, each with further streams of its task.

    Args:
        streams: by the id of every task.
    """

    weigh: Weigh[Any]
    streams: Mapping[str, Mapping[str, Numbers]]

    @property
    def outputs(self) -> Sequence[str]:
        return self.weigh.outputs

    def __call__(self, task: Task, episodes: Sequence[Episode]) -> Weighted:
        weighted, own = self.weigh(task, episodes), self.streams[task.id]
        return Weighted(
            {
                name: [replace(example, streams={**example.streams, **own}) for example in some]
                for name, some in weighted.examples.items()
            },
            weighted.statistics,
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return self.weigh.summarise(statistics)


@dataclass(frozen=True, slots=True)
class SearchWeights:
    """ExSearch's E-step: w(z) from log p(y | x, z), and as the example the trajectory with the gold answer in place, or
    as it is where the weight is a metric of its own answer.
    """

    weighting: WeightingConfig
    agent: AgentConfig
    tokenizer: str
    """Model directory or hub name."""
    protocol: ProtocolName = "exsearch"
    """By whose rules a trajectory's own answer is scored."""
    hinted: int = 0
    """So many first samples of a question were sampled with its answer in the prompt: that theirs is right says
    nothing."""
    usual: int | None = None
    """Trajectories of a question; those that follow were sampled because of these. None: none do."""

    outputs = (SEARCHER,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        renderer = renderer_at(self.tokenizer, self.agent)
        trajectories = [episode.turn(SEARCHER) for episode in episodes]
        usable = [t for t in trajectories if not t.stop_reason.is_infrastructure]
        golds = GoldAnswers.of(task, renderer)
        scorable = [(t, scores) for t in usable if (scores := golds.behind(t))]
        scored = [self._scored(task, *one) for one in scorable]
        logs = weights_of(scored, self.weighting)
        examples = [
            self._example(renderer, trajectory, scores, log_weight)
            for (trajectory, scores), log_weight in zip(scorable, logs or (), strict=logs is not None)
        ]
        turns: list[Array] = []
        if self.weighting.credit == "turn" and logs is not None:
            turns = turn_log_weights(scored, self.weighting)
            by_turn = zip(examples, scorable, turns, strict=True)
            examples = [
                with_turn_weights(example, trajectory, own) for example, (trajectory, _), own in by_turn
            ]
        trained = merge_copies(examples) if self.weighting.merge_copies else examples
        too_long = len(usable) - len(scorable)
        facts = [self._facts(task, *one) for one in scorable]
        hinted = [trajectory.sample < self.hinted for trajectory, _ in scorable]
        return Weighted(
            {SEARCHER: trained},
            statistics_of(scored, logs, trajectories, too_long, facts)
            | {
                "merged_copies": len(examples) - len(trained),
                "turns": sum(map(len, turns)),
                "turns_without_credit": int(sum(np.isneginf(own).sum() for own in turns)),
                "hinted": hinted,
            },
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """As `summarise_scored`; copies that were merged; what turns, hints and further samples came to, if any."""
        found = {"merged_copies": sum(row["merged_copies"] for row in statistics)}
        if self.weighting.credit == "turn":
            found |= {
                name: sum(row[name] for row in statistics) for name in ("turns", "turns_without_credit")
            }
        if self.usual is not None:
            found["further"] = sum(sum(row["stop_reasons"].values()) - self.usual for row in statistics)
        return {**summarise_scored(statistics, self.weighting), **found, **self._of_hinted(statistics)}

    def _of_hinted(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """How many trajectories with a hint have a weight, and their share of all weight, in percent."""
        if not self.hinted:
            return {}
        weighted = [row for row in statistics if row["log_weights"] is not None]
        logs = np.array([log for row in weighted for log in logs_from_json(row["log_weights"])])
        hinted = np.array([flag for row in weighted for flag in row["hinted"]], dtype=np.bool_)
        share = 0.0 if np.isneginf(log_sum(logs)) else 100.0 * math.exp(log_sum(logs[hinted]) - log_sum(logs))
        return {"hinted": int(hinted.sum()), "hinted_weight_share": share}

    @property
    def _trains_own_answer(self) -> bool:
        return self.weighting.method == "reward"

    def _example(
        self, renderer: Renderer, trajectory: Trajectory, golds: Mapping[str, Gold], log_weight: float
    ) -> Example:
        if self._trains_own_answer:
            return Example.of(trajectory, log_weight=log_weight)
        return renderer.with_gold_answer(trajectory, trained_gold(golds, self.weighting), log_weight)

    def _scored(self, question: Question, trajectory: Trajectory, golds: Mapping[str, Gold]) -> Scored:
        own = score_answer(trajectory.answer, question.answers, self.protocol)
        return Scored.of(
            list(golds.values()),
            correct=own.em == 1.0 and trajectory.sample >= self.hinted,
            reward=reward_of(WEIGHTING_REWARD, self.weighting.reward, question, trajectory, own, least=0.0),
            log_ratio=log_ratio(trajectory, with_answer=self._trains_own_answer)
            if self.weighting.correct_proposal
            else 0.0,
            before=trajectory.turn_log_likelihoods,
            further=self.usual is not None and trajectory.sample >= self.usual,
        )

    def _facts(self, question: Question, trajectory: Trajectory, golds: Mapping[str, Gold]) -> Facts:
        own = score_answer(trajectory.answer, question.answers, self.protocol)
        is_recorded = trajectory.proposal_logprobs is not None
        return Facts(
            sample=trajectory.sample,
            gold_tokens=golds[trained_gold(golds, self.weighting)].num_tokens,
            em=own.em,
            f1=own.f1,
            accuracy=own.accuracy,
            log_ratio=log_ratio(trajectory, with_answer=False) if is_recorded else None,
            log_ratio_with_answer=log_ratio(trajectory, with_answer=True) if is_recorded else None,
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What is to be known of a trajectory beside its `Scored` so that its weight by any other method can be computed
    (`pipeline.core.reweighing`).

    `sample` is its number among those of the question, `gold_tokens` the length |y| of the gold answer that the run's
    method trains behind it; `em`, `f1` and `accuracy` are those of its own answer. `log_ratio` is sum log p - log q
    over the sampled tokens in front of its own answer, the other one over those of the answer too: None where log q was
    not recorded.
    """

    sample: int
    gold_tokens: int
    em: float
    f1: float
    accuracy: float
    log_ratio: float | None
    log_ratio_with_answer: float | None


@dataclass(frozen=True, slots=True)
class GoldAnswers:
    """The gold answers of a question that a trajectory was scored with, and their lengths in tokens."""

    token_ids: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, question: Question, renderer: Renderer) -> GoldAnswers:
        return cls({answer: tuple(renderer.answer_ids(answer)) for answer in question.distinct_answers})

    def behind(self, trajectory: Trajectory) -> dict[str, Gold]:
        """Those that fit behind a trajectory.

        Of answers with the same ids, as tokenizers make of different forms of one letter, the first: they are one.
        """
        found: dict[tuple[int, ...], tuple[str, Gold]] = {}
        for (answer, ids), value in zip(self.token_ids.items(), trajectory.log_likelihoods, strict=True):
            if not math.isnan(value):
                found.setdefault(ids, (answer, Gold(value, len(ids))))
        return dict(found.values())


def weights_of(scored: Sequence[Scored], weighting: WeightingConfig) -> list[float] | None:
    """log w of one question's trajectories; None where they have none: there are no trajectories, or weights that
    compare them have nothing to compare the only one with."""
    if not scored or (weighting.compares and len(scored) < 2):
        return None
    return [float(log_weight) for log_weight in log_weights(scored, weighting)]


def statistics_of(
    scored: Sequence[Scored],
    logs: Sequence[float] | None,
    trajectories: Sequence[Trajectory],
    too_long: int,
    facts: Sequence[Facts] = (),
) -> dict[str, Any]:
    """What `summarise_scored` reads, as plain data.

    Args:
        logs: log w; None where there are none.
        trajectories: all of the question.
        too_long: so many of them were too long for any answer to be scored.
        facts: of the scored ones, where other weights are to be computed of them later.
    """
    return {
        "scored": [asdict(one) for one in scored],
        "log_weights": logs,
        "facts": [asdict(one) for one in facts],
        "stop_reasons": count_stop_reasons(trajectories),
        "too_long_to_score": too_long,
        "nothing_to_compare": len(scored) if logs is None else 0,
    }


def summarise_scored(
    statistics: Sequence[Mapping[str, Any]], weighting: WeightingConfig
) -> Mapping[str, Any]:
    """`WeightingSummary`, how trajectories stopped and how many were excluded.

    Args:
        statistics: `statistics_of` each task.

    Raises:
        RuntimeError: nothing was weighted.
    """
    stop_reasons: Counter[str] = Counter()
    for row in statistics:
        stop_reasons.update(row["stop_reasons"])
    alone = sum(row["nothing_to_compare"] for row in statistics)
    scored = [row for row in statistics if row["scored"]]
    if all(row["log_weights"] is None for row in scored):
        why = f"; {alone} were the only usable one of their question" if alone else ""
        raise RunError(f"no trajectory could be weighted; how they stopped: {dict(stop_reasons)}{why}")
    summary = summarise(
        [[scored_from_json(one) for one in row["scored"]] for row in scored],
        [
            None if row["log_weights"] is None else np.array(logs_from_json(row["log_weights"]))
            for row in scored
        ],
        weighting,
    )
    too_long = sum(row["too_long_to_score"] for row in statistics)
    infrastructure = sum(stop_reasons[reason] for reason in StopReason if reason.is_infrastructure)
    return asdict(summary) | {
        "excluded": infrastructure + too_long + alone,
        "excluded_too_long_to_score": too_long,
        "excluded_nothing_to_compare": alone,
        "stop_reasons": dict(stop_reasons),
    }


def log_ratio(trajectory: Trajectory, *, with_answer: bool) -> float:
    """sum log p - log q over the sampled tokens, those of the model's own answer included or not; 0 where q is p."""
    if trajectory.proposal_logprobs is None:
        return 0.0
    sampled = np.flatnonzero(
        trajectory.sampled if with_answer else trajectory.sampled[: trajectory.answer_start]
    )
    log_p, log_q = trajectory.logprobs[sampled], trajectory.proposal_logprobs[sampled]
    return float((log_p.astype(np.float64) - log_q).sum())


def scored_from_json(row: Mapping[str, Any]) -> Scored:
    """One trajectory of `statistics_of`."""
    log_likelihood, per_token = logs_from_json([row["log_likelihood"], row["per_token"]])
    before = tuple(logs_from_json(row.get("before", ())))  # which earlier versions did not write
    return Scored(**{**row, "log_likelihood": log_likelihood, "per_token": per_token, "before": before})


def logs_from_json(logs: Sequence[float | None]) -> list[float]:
    """JSON has no infinity: null is the logarithm of zero."""
    return [-math.inf if value is None else value for value in logs]


@lru_cache(maxsize=4)
def renderer_at(tokenizer: str, agent: AgentConfig) -> Renderer:
    """The renderer of a model directory's tokenizer."""
    return Renderer(load_tokenizer(tokenizer), agent)
