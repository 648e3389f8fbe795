"""think -> search -> record, as an async state machine. Knows no engine and no Ray.

    prompt -> [think turn -> search -> observation] x n -> answer

With `agent.select` the turn behind an observation begins with an ordering of its passages. An action of the user's
(`pipeline.core.actions`) may stand where a sub-query stands: its result is what the environment says then.

One `SearchAgent` serves any number of questions at once; each `run` is a coroutine that waits for nothing but its own
model turns and searches. Every run ends in a `Trajectory` with a typed stop reason; nothing is raised for what the
model or the infrastructure did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.core.actions import Action, ActionUnavailable
from pipeline.core.agents.program import (
    INFRASTRUCTURE,
    Completion,
    Generator,
    Retrieve,
    Sampling,
    derive_seed,
    stop_reason_of,
)
from pipeline.core.agents.transcript import Transcript
from pipeline.core.orderings import ordering_text
from pipeline.core.records import Question, Step, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.turns import Call, MalformedTurn, Turn
from retriever_service.passages.hits import Hit

SEARCHER = "searcher"
"""The role of the search agent."""

ANSWER_RESERVE = 32
"""Tokens kept free for an answer at the end of the context."""

DETAIL_CHARACTERS = 200
"""Kept of what went wrong."""


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one trajectory, for those who watch (`exsearch ask`). `hits` of a selection are the selected ones."""

    kind: Literal["think", "search", "select", "record", "call", "result", "answer", "stop"]
    text: str = ""
    hits: tuple[Hit, ...] = ()


OnEvent = Callable[[Event], None]


class SearchAgent:
    """Runs trajectories of one policy.

    Args:
        renderer: renders and parses; also carries the switches and the actions.
        generator: the engine.
        retrieve: the retriever.
        max_length: longest context in tokens. The last turn always keeps room for an answer.
        keeps_mistakes: leave turns that ended the trajectory because they were malformed or too long in it, and them
            and refused sub-queries and calls targets of training: for losses that make what went wrong less likely.
    """

    def __init__(
        self,
        renderer: Renderer,
        generator: Generator,
        retrieve: Retrieve,
        *,
        max_length: int,
        keeps_mistakes: bool = False,
    ) -> None:
        self.renderer = renderer
        self.config = renderer.config
        self.generator = generator
        self.retrieve = retrieve
        self.max_length = max_length
        self.keeps_mistakes = keeps_mistakes
        if self.config.think:
            self.allowed_searches = self.config.max_searches
        else:
            self.allowed_searches = 1 if self.config.search else 0
        demand = renderer.answer_demand_ids(at_turn_start=False)
        self.answer_reserve = len(demand) + min(self.config.max_turn_tokens, ANSWER_RESERVE)
        """Tokens that no turn and no passage may take: an answer can always be demanded and written."""

    async def run(
        self,
        question: Question,
        *,
        sampling: Sampling,
        sample: int = 0,
        role: str = SEARCHER,
        policy_version: int = 0,
        hint: str = "",
        on_event: OnEvent = lambda event: None,
    ) -> Trajectory:
        """One trajectory.

        Args:
            sampling: temperature, truncation and the trajectory's seed; stop strings and `max_tokens` are set here.
            sample: number of this trajectory among the question's K.
            hint: an answer that the prompt gives away.
        """
        run = _Run(self, question, sampling, on_event, self.renderer.prompt_ids(question.text, hint))
        try:
            ending = await run.to_the_end()
        except INFRASTRUCTURE as error:
            ending = Ending(stop_reason_of(error), len(run.transcript.token_ids), detail=str(error))
        on_event(Event("stop", ending.stop_reason.value))
        return run.transcript.trajectory(
            question_id=question.id,
            sample=sample,
            role=role,
            policy_version=policy_version,
            stop_reason=ending.stop_reason,
            answer=ending.answer,
            answer_start=ending.answer_start,
            answer_opening=ending.answer_opening,
            detail=ending.detail[:DETAIL_CHARACTERS],
        )


@dataclass(frozen=True, slots=True)
class Ending:
    """How a trajectory ends; as in its record."""

    stop_reason: StopReason
    answer_start: int
    answer: str = ""
    answer_opening: Sequence[int] = ()
    detail: str = ""


class _Run:
    """One trajectory in the making."""

    def __init__(
        self,
        agent: SearchAgent,
        question: Question,
        sampling: Sampling,
        on_event: OnEvent,
        prompt: Sequence[int],
    ) -> None:
        self.agent = agent
        self.renderer = agent.renderer
        self.question = question
        self.sampling = sampling
        self.on_event = on_event
        self.prompt = prompt
        self.transcript = Transcript()
        self.num_turns = 0

    async def to_the_end(self) -> Ending:
        self.transcript.append_environment(self.prompt)
        if self.agent.allowed_searches == 0:
            return await self._demand_answer(StopReason.ANSWERED, at_turn_start=True)
        if not self.agent.config.think and not await self._search(self.question.text):
            return self._cut(StopReason.LENGTH_LIMIT, "the passages do not fit")
        while True:
            before = len(self.transcript.token_ids)
            completion = await self._generate()
            if completion.finish_reason == "length":
                return self._cut(StopReason.LENGTH_LIMIT, completion.text, completion)
            try:
                turn = self.renderer.parse_turn(
                    completion.text, expects_record=self._expects_record, passages=self._to_select_from
                )
            except MalformedTurn as error:
                return self._cut(StopReason.MALFORMED, f"{error}: {completion.text!r}", completion)
            self._note(turn)
            self.transcript.append_model(completion)
            if turn.answer is not None:
                self.on_event(Event("answer", turn.answer))
                return self._answered(turn.answer, before, completion)
            refusal = await self._go_on(turn)
            if refusal is not None:
                if not self.agent.keeps_mistakes:
                    self._leave_untrained(turn, before, completion)
                return await self._demand_answer(refusal, at_turn_start=False)
            if turn.call is not None and not self.renderer.actions[turn.call.action].trained:
                self._leave_untrained(turn, before, completion)

    @property
    def _expects_record(self) -> bool:
        return self.agent.config.record and self._has_searched

    @property
    def _to_select_from(self) -> int:
        """Passages that the turn has to select from; 0: it selects nothing."""
        selects = self.agent.config.select and self._has_searched
        return len(self.transcript.steps[-1].hits) if selects else 0

    @property
    def _has_searched(self) -> bool:
        """Whether the turn answers a search, and not the question or an action's result."""
        return bool(self.transcript.steps) and not self.transcript.steps[-1].action

    @property
    def _room(self) -> int:
        """Tokens that the model may still write; one position stays free for the engine's own."""
        return self.agent.max_length - len(self.transcript.token_ids) - 1

    async def _generate(self, stop: tuple[str, ...] | None = None) -> Completion:
        seed = derive_seed(self.sampling.seed, self.num_turns)
        self.num_turns += 1
        room = self._room if stop else self._room - self.agent.answer_reserve
        max_tokens = min(self.agent.config.max_turn_tokens, room)
        if max_tokens < 1:
            return Completion([], [], "", None, "length")
        sampling = replace(
            self.sampling, seed=seed, max_tokens=max_tokens, stop=stop if stop else self.renderer.stop
        )
        return await self.agent.generator.generate(self.transcript.token_ids, sampling)

    async def _go_on(self, turn: Turn) -> StopReason | None:
        """Search or call, as the turn asks for. A reason if it may not be, or nothing would fit behind it."""
        if turn.call is not None:
            return await self._call(turn.call)
        assert turn.query is not None
        self.on_event(Event("think", turn.query))
        if sum(not step.action for step in self.transcript.steps) >= self.agent.allowed_searches:
            return StopReason.STEP_LIMIT
        return None if await self._search(turn.query) else StopReason.LENGTH_LIMIT

    async def _call(self, call: Call) -> StopReason | None:
        """Append what an action says. A reason, and nothing appended, as in `_go_on`."""
        self.on_event(Event("call", f"{call.action}: {call.content}"))
        action, steps = self.renderer.actions[call.action], self.transcript.steps
        if sum(step.action == call.action for step in steps) >= action.limit:
            return StopReason.STEP_LIMIT
        result = await _result_of(action, call.content, tuple(steps))
        if not self._observe(self.renderer.result_ids(action, result)):
            return StopReason.LENGTH_LIMIT
        steps.append(Step(call.content, action=call.action, result=result))
        self.on_event(Event("result", result))
        return None

    async def _search(self, query: str) -> bool:
        """Append what the retriever finds. False, and nothing appended, if no turn would fit behind it."""
        hits: tuple[Hit, ...] = ()
        if self.agent.config.search:
            hits = tuple(await self.agent.retrieve(query, self.agent.config.documents))
        if not self._observe(self.renderer.observation_ids(hits)):
            return False
        self.transcript.steps.append(Step(query, hits))
        self.on_event(Event("search", query, hits))
        return True

    def _observe(self, ids: Sequence[int]) -> bool:
        """Append what the environment says. False, and nothing appended, if no turn would fit behind it."""
        if len(ids) + self.agent.config.max_turn_tokens + self.agent.answer_reserve > self._room:
            return False
        self.transcript.append_environment(ids)
        return True

    def _note(self, turn: Turn) -> None:
        """Keep what a turn says of the passages in front of it with their step."""
        if not (turn.selected or turn.record):
            return
        step = replace(self.transcript.steps[-1], selected=turn.selected, record=turn.record)
        self.transcript.steps[-1] = step
        if turn.selected:
            self.on_event(Event("select", ordering_text(turn.selected), step.used_hits))
        if turn.record:
            self.on_event(Event("record", turn.record))

    def _leave_untrained(self, turn: Turn, turn_start: int, completion: Completion) -> None:
        """The sub-query or call that ends the last turn is no target of training; what is before it stays one."""
        ids, opening = completion.token_ids, self.renderer.opening_of(turn)
        kept, _ = self.renderer.split_at(ids, self.renderer.decode(ids).index(opening))
        self.transcript.refuse(turn_start + kept, turn_start + len(ids))

    async def _demand_answer(self, reason: StopReason, *, at_turn_start: bool) -> Ending:
        """Open an answer in the model's place and let it write."""
        self.transcript.append_environment(self.renderer.answer_demand_ids(at_turn_start=at_turn_start))
        answer_start = len(self.transcript.token_ids)
        closing = self.renderer.tags.answer[1]
        completion = await self._generate(stop=(closing,))
        self.transcript.append_model(completion)
        if completion.stop != closing:
            reason = StopReason.LENGTH_LIMIT if completion.finish_reason == "length" else StopReason.MALFORMED
            return Ending(reason, answer_start, detail=completion.text)
        answer = completion.text.split(closing)[0].strip()
        self.on_event(Event("answer", answer))
        return Ending(reason, answer_start, answer)

    def _cut(self, reason: StopReason, detail: str, turn: Completion | None = None) -> Ending:
        """End without the turn that went wrong, unless mistakes are kept; the answer tag is opened, so that a gold
        answer can be scored."""
        kept = turn if self.agent.keeps_mistakes and turn is not None and turn.token_ids else None
        if kept is not None:
            self.transcript.append_model(kept)
        self.transcript.append_environment(self.renderer.answer_demand_ids(at_turn_start=kept is None))
        return Ending(reason, len(self.transcript.token_ids), detail=detail)

    def _answered(self, answer: str, turn_start: int, completion: Completion) -> Ending:
        """The model opened and closed an answer in its last turn."""
        ids, opening = completion.token_ids, self.renderer.tags.answer[0]
        end = self.renderer.decode(ids).index(opening) + len(opening)
        own, rest = self.renderer.split_at(ids, end)
        return Ending(
            StopReason.ANSWERED, turn_start + own, answer, answer_opening=self.renderer.trusted_ids(rest)
        )


async def _result_of(action: Action, call: str, steps: Sequence[Step]) -> str:
    """
    Raises:
        ActionUnavailable: it says so, or its deadline is over.
    """
    try:
        return await asyncio.wait_for(action(call, steps), action.timeout_s)
    except TimeoutError as error:
        raise ActionUnavailable(f"{action.name} gave no result within {action.timeout_s:g} s") from error
