"""The search agent as a program: one trajectory, and how likely it makes the gold answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from pipeline.core.agents.program import EngineError, Model, Retrieve, Sampling
from pipeline.core.agents.search import SEARCHER, OnEvent, SearchAgent
from pipeline.core.config import AgentConfig
from pipeline.core.records import Episode, Floats, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.weighting import log_sum


def _no_one_watches(event: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class SearchProgram:
    """Runs `SearchAgent` on the role `searcher`.

    What is scored reads the prefix cache that the trajectory has just filled, on the engine that sampled it.
    """

    agent: AgentConfig
    score_answers: bool = False
    """Also score the gold answers: `Trajectory.log_likelihoods`."""
    score_turns: Literal["none", "first", "all"] = "none"
    """With `score_answers`, in front of which turns to score them too: `Trajectory.turn_log_likelihoods`."""
    hinted: int = 0
    """So many first samples of a question are sampled with its answer in the prompt. They are given back without it,
    and with both distributions: log p of the model without the hint, log q of what they were sampled from."""
    keeps_mistakes: bool = False
    """See `SearchAgent`."""
    on_event: OnEvent = _no_one_watches
    """Told what happens; picklable where the program travels."""

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        model = roles[SEARCHER]
        renderer = renderer_of(model.tokenizer, self.agent)
        hint = task.answers[0] if sample < self.hinted else ""
        agent = SearchAgent(
            renderer, model, retrieve, max_length=model.max_length, keeps_mistakes=self.keeps_mistakes
        )
        trajectory = await agent.run(
            task,
            sampling=sampling,
            sample=sample,
            policy_version=model.version,
            hint=hint,
            on_event=self.on_event,
        )
        if hint:
            trajectory = _without_hint(trajectory, renderer, task.text, hint)
        if not trajectory.stop_reason.is_infrastructure:
            try:
                if model.records_proposal or hint:
                    trajectory = await _with_both_distributions(trajectory, model)
                if self.score_answers:
                    trajectory = await self._scored(trajectory, renderer, task, model)
            except EngineError as error:
                trajectory = replace(trajectory, stop_reason=StopReason.ENGINE_ERROR, detail=str(error))
        return Episode(task.id, sample, (trajectory,))

    async def _scored(
        self, trajectory: Trajectory, renderer: Renderer, question: Question, model: Model
    ) -> Trajectory:
        golds = [renderer.answer_ids(answer) for answer in question.distinct_answers]
        found = await answer_log_likelihoods(trajectory, golds, model)
        trajectory = replace(trajectory, log_likelihoods=found)
        if self.score_turns == "none":
            return trajectory
        # Those that the whole trajectory is scored with: only the context differs. The same ids are one answer.
        same = dict.fromkeys(
            tuple(gold) for gold, value in zip(golds, found, strict=True) if not math.isnan(value)
        )
        starts = trajectory.turn_starts.tolist()
        values = await log_likelihoods_in_front(
            trajectory,
            starts[:1] if self.score_turns == "first" else starts,
            [list(gold) for gold in same],
            renderer.answer_demand_ids(at_turn_start=True),
            model,
        )
        return replace(trajectory, turn_log_likelihoods=values)


@dataclass(frozen=True, slots=True)
class FurtherSamples:
    """So many more of a question while none of its trajectories makes a gold answer likelier than not: all alike say
    little of what is better. Those that failed for infrastructure reasons, or knew the answer, say nothing.
    """

    most: int
    hinted: int = 0
    """So many first samples were shown the answer."""

    def __call__(self, episodes: Sequence[Episode]) -> int:
        telling = [
            turn
            for episode in episodes
            if not (turn := episode.turn(SEARCHER)).stop_reason.is_infrastructure
            and turn.sample >= self.hinted
        ]
        # A comparison with NaN, of an answer that does not fit, is false.
        succeeds = any(value > math.log(0.5) for turn in telling for value in turn.log_likelihoods)
        return self.most if telling and not succeeds else 0


async def answer_log_likelihoods(
    trajectory: Trajectory, golds: list[list[int]], model: Model
) -> tuple[float, ...]:
    """log p(y | x, z) of each gold answer's ids behind `answer_context`; NaN where it does not fit.

    Raises:
        EngineError: the engine did not score one.
    """
    return await _behind(trajectory.answer_context.tolist(), golds, model)


async def log_likelihoods_in_front(
    trajectory: Trajectory, starts: Sequence[int], golds: list[list[int]], demand: list[int], model: Model
) -> tuple[float, ...]:
    """log sum_y p(y | x, z up to here) in front of each turn that begins at one of `starts`, if an answer is demanded
    there; minus infinity where none fits.

    Raises:
        EngineError: the engine did not score one.
    """

    async def one(start: int) -> float:
        scores = await _behind([*trajectory.token_ids[:start].tolist(), *demand], golds, model)
        return log_sum([score for score in scores if not math.isnan(score)])

    return tuple(await asyncio.gather(*(one(start) for start in starts)))


async def _behind(context: list[int], golds: list[list[int]], model: Model) -> tuple[float, ...]:
    """log p of each of these behind a context; NaN where it does not fit."""

    async def one(gold: list[int]) -> float:
        if len(context) + len(gold) >= model.max_length:
            return float("nan")
        return sum(await model.token_logprobs([*context, *gold], len(context)))

    return tuple(await asyncio.gather(*(one(gold) for gold in golds)))


def _without_hint(trajectory: Trajectory, renderer: Renderer, question: str, hint: str) -> Trajectory:
    """A trajectory of the prompt with an answer in it, as one of the prompt without: the model's own tokens and what it
    found are the same, and what is scored, weighed and trained never sees the hint.

    Its log-probabilities stay those that it was sampled with: log q.
    """
    prompt, cut = renderer.prompt_ids(question), len(renderer.prompt_ids(question, hint))
    return replace(
        trajectory,
        token_ids=np.concatenate([np.asarray(prompt, dtype=np.int32), trajectory.token_ids[cut:]]),
        loss_mask=np.concatenate([np.zeros(len(prompt), dtype=np.bool_), trajectory.loss_mask[cut:]]),
        logprobs=np.concatenate([np.full(len(prompt), np.nan, np.float32), trajectory.logprobs[cut:]]),
        answer_start=trajectory.answer_start - cut + len(prompt),
    )


async def _with_both_distributions(trajectory: Trajectory, model: Model) -> Trajectory:
    """The engine recorded log q of what it sampled from; log p takes one more forward pass over the trajectory."""
    sampled = np.flatnonzero(trajectory.sampled)
    log_p: Floats = np.full(len(trajectory.token_ids), np.nan, dtype=np.float32)
    if len(sampled):
        first = int(sampled[0])
        scored = await model.token_logprobs(trajectory.token_ids.tolist(), first)
        log_p[sampled] = np.asarray(scored, dtype=np.float32)[sampled - first]
    return replace(trajectory, logprobs=log_p, proposal_logprobs=trajectory.logprobs)


@lru_cache(maxsize=16)
def renderer_of(tokenizer: Any, agent: AgentConfig) -> Renderer:
    """A worker runs one program on many tasks."""
    return Renderer(tokenizer, agent)
