"""Where a run's warm-up examples come from: a file of ready trajectories, or synthesis from gold supervision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from pipeline.config import Config
from pipeline.data.questions import read_questions
from pipeline.data.rewriter import Rewriter
from pipeline.data.warmup import WarmupResult, read_trajectories, synthesise, warmup_examples
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.protocol import Protocol
from pipeline.records import Question, WeightedExample
from pipeline.run import Json
from pipeline.search_agent import Retrieve
from retriever_service.corpus import Corpus


async def warm_up_examples(
    config: Config, train: Sequence[Question], retrieve: Retrieve, index: Path
) -> tuple[list[WeightedExample], Json]:
    """Examples of weight 1, and how they came about.

    Args:
        train: the run's training questions, used where `warmup.sources` names no others.
        retrieve: the run's retriever.
        index: directory of its index, for the gold passages.

    Raises:
        UserError: no question has the supervision that synthesis needs, or a bad trajectory file.
    """
    warmup = config.warmup
    protocol = Protocol(load_tokenizer(config.model.path), config.agent)
    if warmup.trajectories is not None:
        ready = read_trajectories(Path(warmup.trajectories), protocol)
        files = (config.data.train, warmup.sources)
        known = [*train, *(q for paths in files for q in read_questions(paths, root=config.data.root))]
        if unknown := sorted({t.question_id for t in ready} - {q.id for q in known}):
            raise UserError(
                f"{warmup.trajectories} has trajectories of {len(unknown)} questions that are neither in data.train "
                f"nor in warmup.sources ({', '.join(unknown[:5])}); name the files that they come from there"
            )
        return warmup_examples(ready, known, protocol), {"trajectories": len(ready)}
    result, questions = await synthesise_warm_up(config, train, protocol, retrieve, index)
    return warmup_examples(result.trajectories, questions, protocol), {
        "trajectories": len(result.trajectories),
        "skipped": dict(result.skipped),
        "searches": result.searches,
        "gold_passages_inserted": result.inserted,
    }


async def synthesise_warm_up(
    config: Config, train: Sequence[Question], protocol: Protocol, retrieve: Retrieve, index: Path
) -> tuple[WarmupResult, Sequence[Question]]:
    """`warmup.questions` trajectories and the questions that they belong to; see `pipeline.data.warmup`."""
    warmup = config.warmup
    questions: Sequence[Question] = train[: warmup.questions]
    if warmup.sources:
        questions = read_questions(
            warmup.sources, root=config.data.root, limit=warmup.questions, seed=config.seed
        )
    wanted = {hop.supporting_id for q in questions for hop in q.decomposition if hop.supporting_id}
    wanted |= {passage_id for q in questions for passage_id in q.supporting_ids}
    gold = {passage.id: passage for passage in Corpus(index / "passages.arrow") if passage.id in wanted}
    async with AsyncExitStack() as stack:
        rewriter = None
        if warmup.rewrite_endpoint is not None:
            cache = Path(f"{index}.rewritten.jsonl")
            rewriter = await stack.enter_async_context(
                Rewriter(warmup.rewrite_endpoint, warmup.rewrite_model, cache)
            )
        result = await synthesise(
            questions,
            protocol,
            retrieve,
            gold.get,
            max_length=config.model.max_length,
            seed=config.seed,
            rewriter=rewriter,
        )
    if not result.trajectories:
        raise UserError(
            f"warmup.questions is {warmup.questions}, but none of {len(questions)} questions could be made into a "
            f"trajectory: {dict(result.skipped)}; give questions with decompositions or supporting passages "
            "(docs/formats.md), or set warmup.questions=0"
        )
    return result, questions
