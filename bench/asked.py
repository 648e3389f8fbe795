"""What an E-step asks of engines and retriever: noted by a program while it runs, and asked again by others.

What was noted stays in the worker's process. `Again` asks the engine alone, `LockStep` runs the episodes once more, all
of them together, turn by turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.agents.program import Completion, Model, Retrieve, Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.agents.transcript import Transcript
from pipeline.core.records import Episode, Question, StopReason, Trajectory

Request = tuple[list[int], Sampling | int]
"""What an engine was asked: to go on from these ids, or to score those from this index on."""


@dataclass
class Asked:
    """One episode, and what it asked of the engine, in order: turns, and what was scored at the end."""

    task: Question
    sampling: Sampling
    sample: int
    turns: list[Request] = field(default_factory=list)
    scores: list[Request] = field(default_factory=list)


ASKED: list[Asked] = []
"""Of the episodes that ran in this worker's process."""


class _Noted:
    """A model that keeps what it is asked."""

    def __init__(self, model: Model, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        self.version, self.records_proposal = model.version, model.records_proposal

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        self._asked.turns.append((list(prompt_ids), sampling))
        return await self._model.generate(prompt_ids, sampling)

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        self._asked.scores.append((list(token_ids), start))
        return await self._model.token_logprobs(token_ids, start)


@dataclass(frozen=True)
class Noting:
    """A program that keeps what it asked for."""

    program: SearchProgram

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        asked = Asked(task, sampling, sample)
        ASKED.append(asked)
        noted = {name: _Noted(model, asked) for name, model in roles.items()}
        return await self.program(task, noted, retrieve, sampling=sampling, sample=sample)


@dataclass(frozen=True)
class Again:
    """A program that asks a worker's engine once more for all that was noted there, as fast as the engine goes."""

    concurrency: int

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        slots = asyncio.Semaphore(self.concurrency)
        model = roles[SEARCHER]

        async def ask(request: Request) -> None:
            ids, how = request
            if isinstance(how, Sampling):
                await model.generate(ids, how)
            else:
                await model.token_logprobs(ids, how)

        async def alone(asked: Asked) -> None:
            async with slots:
                for request in asked.turns:
                    await ask(request)
                await asyncio.gather(*map(ask, asked.scores))

        await asyncio.gather(*map(alone, ASKED))
        return Episode(task.id, sample, (_nothing(task.id),))


class _Steps:
    """Where agents wait for one another: all that write a turn begin together, and so do all that search.

    Args:
        agents: that have not ended.
    """

    def __init__(self, agents: int) -> None:
        self._agents = agents
        # In this order: whoever has its score to wait for waits until the last turn has been written.
        self._waiting: dict[str, list[asyncio.Future[None]]] = {"search": [], "turn": [], "score": []}

    async def all_here(self, step: str) -> None:
        """Waits until every agent waits and this is the next step."""
        here = asyncio.get_running_loop().create_future()
        self._waiting[step].append(here)
        self._go_on()
        await here

    def leave(self) -> None:
        """An agent has ended."""
        self._agents -= 1
        self._go_on()

    def _go_on(self) -> None:
        if sum(map(len, self._waiting.values())) < self._agents:
            return
        for waiting in self._waiting.values():
            if waiting:
                for here in waiting:
                    here.set_result(None)
                waiting.clear()
                return


class _InStep:
    """One agent's model, which is asked when all agents have come as far."""

    def __init__(self, model: Model, steps: _Steps) -> None:
        self._model, self._steps = model, steps
        self._all_written: asyncio.Task[None] | None = None
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        self.version, self.records_proposal = model.version, model.records_proposal

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        await self._steps.all_here("turn")
        return await self._model.generate(prompt_ids, sampling)

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        if self._all_written is None:  # several golds are scored at once
            self._all_written = asyncio.create_task(self._steps.all_here("score"))
        await self._all_written
        return await self._model.token_logprobs(token_ids, start)


@dataclass(frozen=True)
class LockStep:
    """A program that runs all episodes that were noted in a worker once more, in lock-step.

    As in Search-R1's loop: every trajectory writes a turn, the texts are taken apart, all queries are searched in one
    batch, what was found is put behind the contexts, and so on until the last has ended; then the answers are scored.
    """

    program: SearchProgram

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        steps = _Steps(len(ASKED))

        async def search(query: str, k: int) -> Any:
            await steps.all_here("search")
            # One batch, which the retriever actor makes of what arrives together.
            return await retrieve(query, k)

        async def episode(asked: Asked) -> None:
            models = {name: _InStep(model, steps) for name, model in roles.items()}
            try:
                await self.program(asked.task, models, search, sampling=asked.sampling, sample=asked.sample)
            finally:
                steps.leave()

        await asyncio.gather(*map(episode, ASKED))
        return Episode(task.id, sample, (_nothing(task.id),))


def _nothing(task_id: str) -> Trajectory:
    """What an episode needs to have."""
    return Transcript().trajectory(
        question_id=task_id,
        sample=0,
        role=SEARCHER,
        policy_version=0,
        stop_reason=StopReason.ANSWERED,
        answer="",
        answer_start=0,
    )
