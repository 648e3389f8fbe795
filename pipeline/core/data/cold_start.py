"""The cold start: trajectories from gold supervision, with no other model's help.

A question's gold steps become the turns of a perfect agent, and that script runs through the very same
`SearchAgent` and a real retriever. So prompts, observations, masks and token ids have the layout of sampled
trajectories by construction, under every combination of the agent's switches, and the passages are those that
the retriever really finds. Where it misses a gold passage, that passage takes the place of the last hit, at a
random rank (counted): the evidence can always be read. Where the agent selects, it names the gold passages first,
then others as they are shown. Actions of the user's are called where they say so themselves (`Action.demonstrate`).
(EXSEARCH, App. D.4, lets GPT-4o write the turns and shows the retrieved passage nearest to the gold one.)

Same questions, retriever and seed: same trajectories, in the order of the questions.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.agents.program import Retrieve, Sampling, derive_seed
from pipeline.core.agents.search import SearchAgent
from pipeline.core.data.perfect_agent import GoldRetriever, Script, gold_turns, turn_ids
from pipeline.core.data.supervision import GoldStep, PassageOf, Unusable, gold_steps
from pipeline.core.errors import RunError, UserError
from pipeline.core.record_tables import trajectories_from_table, trajectories_to_table
from pipeline.core.records import Example, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.run import Json, write_table
from pipeline.core.turns import Turn
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

logger = logging.getLogger(__name__)

CONCURRENCY = 128
"""Questions in flight at once, so that the retriever can search in batches."""

_FINGERPRINT = b"exsearch.protocol"


class StepRewriter(Interface):
    """Puts gold steps into better words (`pipeline.core.data.rewriter.Rewriter`)."""

    async def rewrite(self, question: Question, steps: Sequence[GoldStep]) -> list[GoldStep]: ...


@dataclass(frozen=True, slots=True)
class ColdStartResult:
    """Synthesised trajectories, and what became of the rest.

    `skipped` counts the questions without a trajectory by reason; `inserted` the gold passages that the
    retriever had missed, in `searches` searches.
    """

    trajectories: list[Trajectory]
    skipped: Counter[str]
    searches: int
    inserted: int

    def statistics(self) -> Json:
        """Counts for a report."""
        return {
            "trajectories": len(self.trajectories),
            "skipped": dict(self.skipped),
            "searches": self.searches,
            "gold_passages_inserted": self.inserted,
        }


async def synthesise(
    questions: Sequence[Question],
    renderer: Renderer,
    retrieve: Retrieve,
    passage_of: PassageOf,
    *,
    max_length: int,
    seed: int,
    rewriter: StepRewriter | None = None,
) -> ColdStartResult:
    """One trajectory per question that carries enough gold supervision.

    Args:
        retrieve: the retriever that the agent will train with.
        passage_of: passage of an id, None if the corpus does not have it.
        max_length: longest context in tokens; questions that do not fit are skipped.
        seed: of the ranks at which missed gold passages are put.
        rewriter: rewrites sub-queries and evidence; `Unusable` skips a question, others end it all.

    Raises:
        RuntimeError: the retriever could not be reached, all attempts included. A query that it refuses or answers with
            what makes no sense costs its question only.
    """
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(question: Question) -> tuple[Trajectory | str, GoldRetriever | None]:
        async with slots:
            try:
                steps = gold_steps(question, passage_of, lambda passage: _shown_text(renderer, passage))
                if renderer.config.think and len(steps) > renderer.config.max_searches:
                    return "more steps than agent.max_searches", None
                if rewriter is not None:
                    steps = await rewriter.rewrite(question, steps)
            except Unusable as reason:
                return str(reason), None
            rng = random.Random(derive_seed(seed, question.id))
            selects = renderer.config.selected_documents if renderer.config.select else 0
            retriever = GoldRetriever(retrieve, steps, rng, selects)
            script = Script(renderer, gold_turns(renderer, question, steps, retriever))
            agent = SearchAgent(renderer, script, retriever, max_length=max_length)
            trajectory = await agent.run(question, sampling=_GREEDY)
        if trajectory.stop_reason is StopReason.RETRIEVER_BAD_ANSWER:
            logger.warning(f"the cold start skips question {question.id}: {trajectory.detail}")
        elif trajectory.stop_reason.is_infrastructure:
            raise RunError(f"the cold start of question {question.id} failed: {trajectory.detail}")
        if trajectory.stop_reason is not StopReason.ANSWERED:
            return f"agent stopped: {trajectory.stop_reason.value}", None
        if len(renderer.with_gold_answer(trajectory, question.answers[0], 0.0).token_ids) > max_length:
            return f"agent stopped: {StopReason.LENGTH_LIMIT.value}", None
        return trajectory, retriever

    results = await asyncio.gather(*(one(question) for question in questions))
    result = ColdStartResult(
        trajectories=[t for t, _ in results if isinstance(t, Trajectory)],
        skipped=Counter(reason for reason, _ in results if isinstance(reason, str)),
        searches=sum(r.searches for _, r in results if r is not None),
        inserted=sum(r.inserted for _, r in results if r is not None),
    )
    logger.info(
        f"cold start: {len(result.trajectories)} trajectories of {len(questions)} questions; "
        f"{result.inserted} gold passages put among the hits of {result.searches} searches; "
        f"skipped: {dict(result.skipped)}"
    )
    return result


def supervised_examples(
    trajectories: Sequence[Trajectory], questions: Sequence[Question], renderer: Renderer
) -> list[Example]:
    """The trajectories as training examples of weight 1, with the question's first gold answer.

    Raises:
        ValueError: a trajectory's question is not among `questions`.
    """
    answers = {question.id: question.answers[0] for question in questions}
    if unknown := {t.question_id for t in trajectories} - answers.keys():
        raise ValueError(f"cold-start trajectories of unknown questions: {sorted(unknown)[:5]}")
    return [renderer.with_gold_answer(t, answers[t.question_id], 0.0) for t in trajectories]


def write_trajectories(path: Path, trajectories: Sequence[Trajectory], renderer: Renderer) -> None:
    """Write a Parquet file (`TRAJECTORY_SCHEMA`), complete or not at all."""
    table = trajectories_to_table(trajectories)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, table.replace_schema_metadata({_FINGERPRINT: _fingerprint(renderer)}))


def read_trajectories(path: Path, renderer: Renderer) -> list[Trajectory]:
    """Read what `write_trajectories` wrote.

    Raises:
        UserError: not such a file, no trajectories, or token ids that mean something else to this model.
    """
    if not path.is_file():
        raise UserError(f"no trajectory file {path}; write one with `exsearch cold-start --out {path}`")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is not a Parquet file ({error!s:.200}); write one with `exsearch cold-start`"
        ) from error
    stored = (table.schema.metadata or {}).get(_FINGERPRINT)
    if stored is None:
        raise UserError(f"{path} does not hold cold-start trajectories; write it with `exsearch cold-start`")
    if stored != _fingerprint(renderer):
        raise UserError(
            f"{path} was made with another tokenizer or other agent.* settings than this run's; make it "
            "again with `exsearch cold-start` and this run's configuration"
        )
    if table.num_rows == 0:
        raise UserError(f"{path} holds no trajectories; make it again with `exsearch cold-start`")
    try:
        return trajectories_from_table(table)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no whole trajectories ({error!s:.200}); make it again with `exsearch cold-start`"
        ) from error


_GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=0, seed=0, stop=())


def _shown_text(renderer: Renderer, passage: Passage) -> str:
    """The part of a passage's text that fits into an observation."""
    head = f"{passage.title}: " if passage.title else ""
    encoded = renderer.tokenizer(head + passage.text, add_special_tokens=False, split_special_tokens=True)
    ids = encoded["input_ids"]
    if len(ids) <= renderer.config.max_document_tokens:
        return passage.text
    return renderer.decode(ids[: renderer.config.max_document_tokens]).removeprefix(head)


def _fingerprint(renderer: Renderer) -> bytes:
    """Says what token ids mean: the ids of one fixed exchange."""
    hit = Hit(Passage("p", "Silver Harp", "The Silver Harp is made by Orvane."), 1.0)
    turn = Turn(record="Orvane makes it.", query="Who founded Orvane?")
    ids = [
        *renderer.prompt_ids("Who founded the maker of the Silver Harp?"),
        *renderer.observation_ids([hit]),
        *turn_ids(renderer, renderer.turn_text(turn)),
        *renderer.answer_ids("Mara Velin"),
    ]
    config, actions = renderer.config, renderer.actions.values()
    switches = (config.think, config.search, config.record)
    selection = (renderer.tags.select, config.selected_documents) if config.select else ()
    called = [(action.name, action.tags, action.result_tags) for action in actions]
    meaning = repr((ids, switches, selection, called))
    return hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest().encode()
