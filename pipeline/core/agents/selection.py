"""A selector that chooses passages from what the retriever found, and a generator that answers from them.

    selector   question, passages [1] ... [n]         -> "[3] > [1] > [7] </record>"
    generator  question, the chosen ones in that order -> the answer

A selection is written as a record (`agent.tags.record`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.agents.program import (
    INFRASTRUCTURE,
    Model,
    Retrieve,
    Sampling,
    derive_seed,
    stop_reason_of,
)
from pipeline.core.agents.search_program import answer_log_likelihoods, renderer_of
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import AgentConfig
from pipeline.core.orderings import BadOrdering, named_passages, ordering_text, parse_ordering
from pipeline.core.records import Episode, Question, Step, StopReason, Trajectory
from retriever_service.passages.hits import Hit

SELECTOR, GENERATOR = "selector", "generator"


@dataclass(frozen=True, slots=True)
class SelectThenAnswer:
    """One turn of the selector, then one of the generator: it writes an answer, or the gold ones are scored.

    Both turns hold the chosen passages, in their order, as their step.
    """

    agent: AgentConfig
    """How a passage is shown, and the layout."""
    candidates: int
    """Passages that the selector chooses from: what the retriever finds for the question itself."""
    chosen: int
    """Passages that it chooses."""
    scores_answers: bool = False
    """Score the gold answers (`Trajectory.log_likelihoods`) in place of writing one."""

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        turns: list[Trajectory] = []
        try:
            hits = await retrieve(task.text, self.candidates)
            turns.append(await self._select(task, hits, roles[SELECTOR], sampling, sample))
            turns.append(await self._answer(task, turns[0].steps[0].hits, roles[GENERATOR], sampling, sample))
        except INFRASTRUCTURE as error:
            failed = Transcript().trajectory(
                question_id=task.id,
                sample=sample,
                role=GENERATOR,
                policy_version=roles[GENERATOR].version,
                stop_reason=stop_reason_of(error),
                detail=str(error),
            )
            turns.append(failed)
        return Episode(task.id, sample, tuple(turns))

    async def _select(
        self, task: Question, hits: Sequence[Hit], model: Model, sampling: Sampling, sample: int
    ) -> Trajectory:
        """The selector's turn; its step holds the chosen passages. What it leaves open the retriever's order fills."""
        transcript, closing = Transcript(), self.agent.tags.record[1]
        transcript.append_environment(select_prompt(self.agent, model.tokenizer, task, hits))
        seed = derive_seed(sampling.seed, SELECTOR)
        completion = await model.generate(
            transcript.token_ids,
            replace(sampling, max_tokens=8 * self.chosen + 8, stop=(closing,), seed=seed),
        )
        transcript.append_model(completion)
        written, most = completion.text.removesuffix(closing).strip(), min(self.chosen, len(hits))
        named = named_passages(written, len(hits))[: self.chosen]
        order = [*named, *(i for i in range(len(hits)) if i not in named)][: self.chosen]
        transcript.steps.append(Step(task.text, tuple(hits[i] for i in order)))
        well_formed = completion.stop == closing and _orders(written, len(hits), most)
        return transcript.trajectory(
            question_id=task.id,
            sample=sample,
            role=SELECTOR,
            policy_version=model.version,
            stop_reason=StopReason.ANSWERED if well_formed else StopReason.MALFORMED,
            detail="" if well_formed else completion.text[:200],
        )

    async def _answer(
        self, task: Question, chosen: Sequence[Hit], model: Model, sampling: Sampling, sample: int
    ) -> Trajectory:
        renderer, transcript = renderer_of(model.tokenizer, self.agent), Transcript()
        transcript.append_environment(answer_prompt(self.agent, model.tokenizer, task, chosen))
        transcript.steps.append(Step(task.text, tuple(chosen)))
        start, closing = len(transcript.token_ids), renderer.tags.answer[1]
        answer, ended = "", True
        if not self.scores_answers:
            limit, seed = self.agent.max_turn_tokens, derive_seed(sampling.seed, GENERATOR)
            completion = await model.generate(
                transcript.token_ids, replace(sampling, max_tokens=limit, stop=(closing,), seed=seed)
            )
            transcript.append_model(completion)
            answer, ended = completion.text.split(closing)[0].strip(), completion.stop == closing
        turn = transcript.trajectory(
            question_id=task.id,
            sample=sample,
            role=GENERATOR,
            policy_version=model.version,
            stop_reason=StopReason.ANSWERED if ended else StopReason.LENGTH_LIMIT,
            answer=answer if ended else "",
            answer_start=start,
        )
        if not self.scores_answers:
            return turn
        golds = [renderer.answer_ids(gold) for gold in task.distinct_answers]
        return replace(turn, log_likelihoods=await answer_log_likelihoods(turn, golds, model))


def _orders(text: str, count: int, wanted: int) -> bool:
    """Whether a text is an ordering of so many of the passages, and nothing else."""
    try:
        return len(parse_ordering(text, count, wanted)) == wanted
    except BadOrdering:
        return False


def select_prompt(agent: AgentConfig, tokenizer: Any, task: Question, hits: Sequence[Hit]) -> list[int]:
    """The question and its numbered candidates, up to where the selector writes."""
    renderer = renderer_of(tokenizer, agent)
    shown = [*renderer.prompt_ids(task.text), *renderer.observation_ids(hits)]
    return [*shown, *renderer.trusted_ids(renderer.tags.record[0])]


def answer_prompt(agent: AgentConfig, tokenizer: Any, task: Question, chosen: Sequence[Hit]) -> list[int]:
    """The question and the chosen passages, numbered anew in their order, up to where the generator writes."""
    renderer = renderer_of(tokenizer, agent)
    shown = [*renderer.prompt_ids(task.text), *renderer.observation_ids(chosen)]
    return [*shown, *renderer.answer_demand_ids(at_turn_start=True)]


def selection_ids(agent: AgentConfig, tokenizer: Any, order: Sequence[int]) -> list[int]:
    """What a selector writes that chooses these passages, counted from 0."""
    return renderer_of(tokenizer, agent).trusted_ids(f" {ordering_text(order)} {agent.tags.record[1]}")
