"""The weighting actor: a question's K trajectories in, K weighted examples out.

It works while rollouts go on. For every finished question it has the gold answers scored on the engine that has just
sampled the trajectories (its prefix cache still holds them), turns likelihoods into weights
(`pipeline.core.weighting`), and writes shards as soon as all questions of a shard are in. What is in a shard depends
only on the questions, never on the order in which they finish.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from pipeline.core.config import Config
from pipeline.core.evaluation import score_answer
from pipeline.core.models import load_tokenizer
from pipeline.core.records import (
    Question,
    ScoreRequest,
    Trajectory,
    WeightedExample,
    count_stop_reasons,
    examples_to_table,
    trajectories_to_table,
)
from pipeline.core.renderer import Renderer
from pipeline.core.run import write_table
from pipeline.core.weighting import Array, Scored, best_answer, importance_weights, summarise


@dataclass(frozen=True, slots=True)
class _Group:
    """One question, weighted."""

    trajectories: list[Trajectory]
    examples: list[WeightedExample]
    scored: list[Scored]
    weights: Array
    unscorable: int


class Weighting:
    """The actor class.

    Args:
        config: the run's configuration (weighting, agent, model length).
        tokenizer_path: model directory whose tokenizer the policy uses.
    """

    def __init__(self, config: Config, tokenizer_path: str) -> None:
        self.config = config
        self.renderer = Renderer(load_tokenizer(tokenizer_path), config.agent)

    async def begin(self, questions: list[Question], rollouts: Path, weighted: Path) -> None:
        """Start an E-step over `questions`; shards go to the two (empty) directories."""
        self._questions = {question.id: question for question in questions}
        self._order = {question.id: index for index, question in enumerate(questions)}
        self._rollouts, self._weighted = rollouts, weighted
        self._groups: dict[int, _Group] = {}
        self._shard_size = self.config.em.questions_per_shard
        self._scored: dict[int, tuple[list[Scored], Array]] = {}
        self._counts: Counter[str] = Counter()

    async def add(self, group: list[Trajectory], worker: ActorHandle[Any]) -> None:
        """Weight one question's trajectories, scored by `worker`. Either all of it is kept or, on failure, nothing."""
        question = self._questions[group[0].question_id]
        weighted = await self._weigh(question, group, worker)
        index = self._order[question.id]
        self._groups[index] = weighted
        self._scored[index] = (weighted.scored, weighted.weights)
        self._counts.update(count_stop_reasons(group))
        self._counts["unscorable"] += weighted.unscorable
        self._write_shard_if_complete(index // self._shard_size)

    async def finish(self) -> dict[str, Any]:
        """Statistics of the E-step.

        Raises:
            RuntimeError: questions are missing, or none could be weighted.
        """
        missing = len(self._questions) - len(self._scored)
        if missing:
            raise RuntimeError(
                f"the E-step is not complete: {missing} of {len(self._questions)} questions are missing"
            )
        groups = [self._scored[index] for index in sorted(self._scored) if self._scored[index][0]]
        if not groups:
            raise RuntimeError(
                f"no trajectory of the E-step could be weighted; how they stopped: {dict(self._counts)}"
            )
        summary = summarise([scored for scored, _ in groups], [weights for _, weights in groups])
        infrastructure = self._counts["retriever_unavailable"] + self._counts["engine_error"]
        unscorable = self._counts.pop("unscorable")
        return asdict(summary) | {
            "excluded": infrastructure + unscorable,
            "excluded_too_long_to_score": unscorable,
            "stop_reasons": dict(self._counts),
        }

    async def _weigh(self, question: Question, group: list[Trajectory], worker: ActorHandle[Any]) -> _Group:
        usable = [t for t in group if not t.stop_reason.is_infrastructure]
        golds = [(answer, self.renderer.answer_ids(answer)) for answer in dict.fromkeys(question.answers)]
        requests, owners = [], []
        for number, trajectory in enumerate(usable):
            for gold_number, (_, ids) in enumerate(golds):
                if trajectory.answer_start + len(ids) < self.config.model.max_length:
                    context = trajectory.token_ids[: trajectory.answer_start]
                    token_ids = np.concatenate([context, np.asarray(ids, dtype=np.int32)])
                    requests.append(ScoreRequest(token_ids, trajectory.answer_start))
                    owners.append((number, gold_number))
        log_likelihoods = await worker.score.remote(requests) if requests else []
        by_trajectory: dict[int, list[tuple[int, float]]] = {}
        for (number, gold_number), value in zip(owners, log_likelihoods, strict=True):
            by_trajectory.setdefault(number, []).append((gold_number, value))
        scorable = sorted(by_trajectory)
        log_ratios = await self._log_ratios([usable[number] for number in scorable], worker)
        scored, examples = [], []
        for number, log_ratio in zip(scorable, log_ratios, strict=True):
            candidates = by_trajectory[number]
            gold_number, log_likelihood = candidates[best_answer([value for _, value in candidates])]
            answer, ids = golds[gold_number]
            own = score_answer(usable[number].answer, question.answers)
            scored.append(
                Scored(
                    log_likelihood=log_likelihood,
                    num_tokens=len(ids),
                    correct=own.em == 1.0,
                    reward=getattr(own, self.config.weighting.reward),
                    log_ratio=log_ratio,
                )
            )
            examples.append((usable[number], answer))
        weights = importance_weights(scored, self.config.weighting) if scored else np.zeros(0)
        return _Group(
            trajectories=group,
            examples=[
                self.renderer.with_gold_answer(trajectory, answer, float(weight))
                for (trajectory, answer), weight in zip(examples, weights, strict=True)
            ],
            scored=scored,
            weights=weights,
            unscorable=len(usable) - len(scored),
        )

    async def _log_ratios(self, trajectories: list[Trajectory], worker: ActorHandle[Any]) -> list[float]:
        """sum log p(z) - log q(z) over sampled tokens; 0 unless the proposal is to be corrected.

        The engine then recorded log q; log p takes one more forward pass over the trajectory.
        """
        if not self.config.weighting.correct_proposal:
            return [0.0] * len(trajectories)
        sampled = [np.flatnonzero(t.loss_mask[: t.answer_start]) for t in trajectories]
        requests = [
            ScoreRequest(trajectory.token_ids[: trajectory.answer_start], int(positions[0]))
            for trajectory, positions in zip(trajectories, sampled, strict=True)
            if len(positions)
        ]
        scores = iter(await worker.token_logprobs.remote(requests) if requests else [])
        ratios = []
        for trajectory, positions in zip(trajectories, sampled, strict=True):
            if len(positions) == 0:  # the environment opened the answer at once
                ratios.append(0.0)
                continue
            log_p = np.asarray(next(scores))[positions - positions[0]]
            ratios.append(float((log_p - trajectory.logprobs[positions]).sum()))
        return ratios

    def _write_shard_if_complete(self, shard: int) -> None:
        first = shard * self._shard_size
        members = range(first, min(first + self._shard_size, len(self._questions)))
        if not all(index in self._groups for index in members):
            return
        groups = [self._groups.pop(index) for index in members]
        name = f"{shard:06d}.parquet"
        write_table(self._rollouts / name, trajectories_to_table(t for g in groups for t in g.trajectories))
        write_table(self._weighted / name, examples_to_table(e for g in groups for e in g.examples))


WeightingActor = ray.remote(Weighting)
