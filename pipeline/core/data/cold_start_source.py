"""Where a run's cold-start examples come from: a file of ready trajectories, or synthesis from gold supervision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.agents.program import Retrieve
from pipeline.core.config import Config
from pipeline.core.data.cold_start import ColdStartResult, read_trajectories, supervised_examples, synthesise
from pipeline.core.data.questions import read_questions, sample_questions
from pipeline.core.data.rewriter import Rewriter
from pipeline.core.data.supervision import is_supervised
from pipeline.core.errors import UserError
from pipeline.core.records import Example, Question, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import Searched, corpus_paths, passages
from pipeline.core.run import Json
from retriever_service.passages.corpus import read_corpus


@dataclass(frozen=True, slots=True)
class ColdStartSource:
    """What the cold start is made from: questions, and the trajectories of them if those are ready."""

    questions: Sequence[Question]
    ready: Sequence[Trajectory] | None = None


def load_cold_start_source(config: Config, train: Sequence[Question], renderer: Renderer) -> ColdStartSource:
    """Read and check everything that a cold start needs, before anything expensive.

    Args:
        train: the run's training questions, used where `cold_start.sources` names no others.

    Returns:
        the ready trajectories of `cold_start.trajectories`, else `cold_start_questions`.

    Raises:
        UserError: no question has the supervision that synthesis needs, or a bad trajectory file.
    """
    cold_start, root = config.cold_start, config.data.root
    if cold_start.trajectories is not None:
        ready = read_trajectories(Path(cold_start.trajectories), renderer)
        files = (config.data.train, cold_start.sources)
        known = [*train, *(q for paths in files for q in read_questions(paths, root=root))]
        if unknown := sorted({t.question_id for t in ready} - {q.id for q in known}):
            raise UserError(
                f"{cold_start.trajectories} has trajectories of {len(unknown)} questions that are neither in "
                f"data.train nor in cold_start.sources ({', '.join(unknown[:5])}); name the files that they come from "
                "there"
            )
        return ColdStartSource(known, ready)
    return ColdStartSource(cold_start_questions(config, train))


def cold_start_questions(config: Config, train: Sequence[Question]) -> list[Question]:
    """A sample of `cold_start.questions` questions with gold supervision, of `cold_start.sources` or else of `train`.

    Raises:
        UserError: no question has the supervision that synthesis needs, or nothing has the gold passages.
        RetrieverError: a source of the gold passages that cannot be read.
    """
    _check_gold_source(config)
    cold_start, root = config.cold_start, config.data.root
    pool = read_questions(cold_start.sources, root=root) if cold_start.sources else train
    supervised = [q for q in pool if is_supervised(q)]
    if not supervised:
        raise UserError(
            f"cold_start.questions is {cold_start.questions}, but none of {len(pool)} questions names its supporting "
            "passages; give questions that do (docs/formats.md), or set cold_start.questions=0"
        )
    return sample_questions(supervised, cold_start.questions, config.seed)


def _check_gold_source(config: Config) -> None:
    """Servers give passages for queries, not for ids: the gold ones are read from the corpus."""
    if config.retriever.url is None:
        return
    if not config.data.corpus:
        raise UserError(
            "cold_start.questions needs the gold passages, and retriever.url cannot give passages by id: set "
            "data.corpus to the corpus that is served, or name ready trajectories (cold_start.trajectories), or set "
            "cold_start.questions=0"
        )
    for path in corpus_paths(config.data):
        next(read_corpus([path]))


async def cold_start_examples(
    config: Config,
    source: ColdStartSource,
    renderer: Renderer,
    retrieve: Retrieve,
    searched: Searched,
    cache: Path,
) -> tuple[list[Example], Json]:
    """Examples of weight 1, and how they came about.

    Args:
        retrieve: the run's retriever.
        searched, cache: see `synthesise_cold_start`.

    Raises:
        UserError: no trajectory came of the questions.
    """
    if source.ready is not None:
        return supervised_examples(source.ready, source.questions, renderer), {
            "trajectories": len(source.ready)
        }
    result = await synthesise_cold_start(config, source.questions, renderer, retrieve, searched, cache)
    return supervised_examples(result.trajectories, source.questions, renderer), result.statistics()


async def synthesise_cold_start(
    config: Config,
    questions: Sequence[Question],
    renderer: Renderer,
    retrieve: Retrieve,
    searched: Searched,
    cache: Path,
) -> ColdStartResult:
    """Trajectories of the questions; see `pipeline.core.data.cold_start`.

    Args:
        searched: what the retriever searches, for the gold passages.
        cache: file of the answers of `cold_start.rewrite_endpoint`, which a second synthesis does not ask for again.

    Raises:
        UserError: no trajectory came of them.
    """
    cold_start = config.cold_start
    wanted = {hop.supporting_id for q in questions for hop in q.decomposition if hop.supporting_id}
    wanted |= {passage_id for q in questions for passage_id in q.supporting_ids}
    gold = {passage.id: passage for passage in passages(config.data, searched) if passage.id in wanted}
    async with AsyncExitStack() as stack:
        rewriter = None
        if cold_start.rewrite_endpoint is not None:
            rewriter = await stack.enter_async_context(
                Rewriter(cold_start.rewrite_endpoint, cold_start.rewrite_model, cache)
            )
        result = await synthesise(
            questions,
            renderer,
            retrieve,
            gold.get,
            max_length=config.model.max_length,
            seed=config.seed,
            rewriter=rewriter,
        )
    if not result.trajectories:
        raise UserError(
            f"cold_start.questions is {cold_start.questions}, but none of {len(questions)} questions could be made "
            f"into a trajectory: {dict(result.skipped)}; give questions with decompositions or supporting passages "
            "(docs/formats.md), or set cold_start.questions=0"
        )
    return result
