"""The search agent as a program: one trajectory, and how likely it makes the gold answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.core.agents.program import EngineError, Model, Retrieve, Sampling
from pipeline.core.agents.search import SEARCHER, OnEvent, SearchAgent
from pipeline.core.config import AgentConfig
from pipeline.core.records import Episode, Floats, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer


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
        trajectory = await SearchAgent(renderer, model, retrieve, max_length=model.max_length).run(
            task,
            sampling=sampling,
            sample=sample,
            policy_version=model.version,
            on_event=self.on_event,
        )
        if not trajectory.stop_reason.is_infrastructure:
            try:
                if model.records_proposal:
                    trajectory = await _with_both_distributions(trajectory, model)
                if self.score_answers:
                    golds = [renderer.answer_ids(answer) for answer in task.distinct_answers]
                    trajectory = replace(
                        trajectory, log_likelihoods=await answer_log_likelihoods(trajectory, golds, model)
                    )
            except EngineError as error:
                trajectory = replace(trajectory, stop_reason=StopReason.ENGINE_ERROR, detail=str(error))
        return Episode(task.id, sample, (trajectory,))


async def answer_log_likelihoods(
    trajectory: Trajectory, golds: list[list[int]], model: Model
) -> tuple[float, ...]:
    """log p(y | x, z) of each gold answer's ids behind `answer_context`; NaN where it does not fit.

    Raises:
        EngineError: the engine did not score one.
    """
    context = trajectory.answer_context.tolist()

    async def one(gold: list[int]) -> float:
        if len(context) + len(gold) >= model.max_length:
            return float("nan")
        return sum(await model.token_logprobs([*context, *gold], len(context)))

    return tuple(await asyncio.gather(*(one(gold) for gold in golds)))


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
