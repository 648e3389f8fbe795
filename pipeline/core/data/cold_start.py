"""The cold start: trajectories from gold supervision, with no other model's help.

A question's gold steps become the turns of a perfect agent, and that script runs through the very same
`SearchAgent` and a real retriever. So prompts, observations, masks and token ids have the layout of sampled
trajectories by construction, under every combination of the agent's switches, and the passages are those that
the retriever really finds. Where it misses a gold passage, that passage takes the place of the last hit, at a
random rank (counted): the evidence can always be read. (EXSEARCH, App. D.4, lets GPT-4o write the turns and
shows the retrieved passage nearest to the gold one.)

Same questions, retriever and seed: same trajectories, in the order of the questions.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.agents.program import Completion, Retrieve, Sampling, derive_seed
from pipeline.core.agents.search import SearchAgent
from pipeline.core.data.supervision import GoldStep, PassageOf, Unusable, gold_steps
from pipeline.core.errors import RunError, UserError
from pipeline.core.record_tables import trajectories_from_table, trajectories_to_table
from pipeline.core.records import Example, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer, Turn
from pipeline.core.run import Json, write_table
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

    async def one(question: Question) -> tuple[Trajectory | str, _GoldRetriever | None]:
        async with slots:
            try:
                steps = gold_steps(question, passage_of, lambda passage: _shown_text(renderer, passage))
                if renderer.config.think and len(steps) > renderer.config.max_searches:
                    return "more steps than agent.max_searches", None
                if rewriter is not None:
                    steps = await rewriter.rewrite(question, steps)
            except Unusable as reason:
                return str(reason), None
            retriever = _GoldRetriever(retrieve, steps, random.Random(derive_seed(seed, question.id)))
            agent = SearchAgent(
                renderer, _Script(renderer, question, steps), retriever, max_length=max_length
            )
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


class _Script:
    """A `Generator` that says the turns of a perfect agent. Its log-probabilities are 0: it was certain."""

    def __init__(self, renderer: Renderer, question: Question, steps: Sequence[GoldStep]) -> None:
        self.renderer = renderer
        self.turns = iter(_turns(renderer, question, steps))

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        text = next(self.turns)
        ids = _turn_ids(self.renderer, text)
        if len(ids) > sampling.max_tokens:
            return Completion(ids[: sampling.max_tokens], [0.0] * sampling.max_tokens, text, None, "length")
        stop = next((s for s in sampling.stop if text.endswith(s)), None)
        # Another turn is due than the one that the agent asks for only where it has run out of room.
        return Completion(ids, [0.0] * len(ids), text, stop, "stop" if stop else "length")


def _turns(renderer: Renderer, question: Question, steps: Sequence[GoldStep]) -> list[str]:
    config, answer = renderer.config, question.answers[0]
    if not config.think:
        # One search with the question itself, or none; then the environment opens the answer.
        if not config.search:
            return [f" {answer} {renderer.tags.answer[1]}"]
        evidence = " ".join(dict.fromkeys(step.evidence for step in steps)) if config.record else ""
        return [renderer.turn_text(Turn(record=evidence, answer=answer))]
    records = [step.evidence if config.record else "" for step in steps]
    turns = [
        Turn(record=record, query=step.query) for record, step in zip(["", *records[:-1]], steps, strict=True)
    ]
    return [renderer.turn_text(turn) for turn in [*turns, Turn(record=records[-1], answer=answer)]]


def _turn_ids(renderer: Renderer, text: str) -> list[int]:
    """Ids of a turn. Only the protocol's own tags may become special tokens, never what evidence quotes."""
    tokenizer, tags = renderer.tokenizer, renderer.tags
    special = [
        s
        for pair in (tags.think, tags.record, tags.answer)
        for s in pair
        if s in tokenizer.all_special_tokens
    ]
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=piece not in special)[
            "input_ids"
        ]
    return ids


class _GoldRetriever:
    """The real retriever, with the gold passage of each search put among the hits if it was missed."""

    def __init__(self, retrieve: Retrieve, steps: Sequence[GoldStep], rng: random.Random) -> None:
        self.retrieve = retrieve
        self.passages_of: dict[str, list[Passage]] = {}
        self.all_passages = [step.passage for step in steps]
        for step in steps:
            self.passages_of.setdefault(step.query.strip(), []).append(step.passage)
        self.rng = rng
        self.searches = 0
        self.inserted = 0

    async def __call__(self, query: str, k: int) -> list[Hit]:
        hits = list(await self.retrieve(query, k))
        # The question itself stands for all steps where the agent does not think.
        wanted = list(dict.fromkeys(self.passages_of.get(query, self.all_passages)))[:k]
        self.searches += 1
        wanted_ids = {passage.id for passage in wanted}
        for passage in wanted:
            if all(hit.passage.id != passage.id for hit in hits):
                hits = self._with(hits, passage, k, wanted_ids)
                self.inserted += 1
        return hits

    def _with(self, hits: list[Hit], passage: Passage, k: int, keep: set[str]) -> list[Hit]:
        """`hits` with the passage at a random rank, in place of the last one that is not gold itself."""
        hits = list(hits)
        if len(hits) >= k:
            del hits[max(rank for rank, hit in enumerate(hits) if hit.passage.id not in keep)]
        rank = self.rng.randint(0, len(hits))
        neighbour = hits[min(rank, len(hits) - 1)].score if hits else 0.0
        return [*hits[:rank], Hit(passage, neighbour), *hits[rank:]]


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
        *_turn_ids(renderer, renderer.turn_text(turn)),
        *renderer.answer_ids("Mara Velin"),
    ]
    switches = (renderer.config.think, renderer.config.search, renderer.config.record)
    return hashlib.blake2b(repr((ids, switches)).encode(), digest_size=16).hexdigest().encode()
