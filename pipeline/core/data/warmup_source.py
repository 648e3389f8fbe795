"""Where a run's warm-up examples come from: a file of ready trajectories, or synthesis from gold supervision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.agents.program import Retrieve
from pipeline.core.config import Config
from pipeline.core.data.questions import read_questions, sample_questions
from pipeline.core.data.rewriter import Rewriter
from pipeline.core.data.supervision import is_supervised
from pipeline.core.data.warmup import WarmupResult, read_trajectories, synthesise, warmup_examples
from pipeline.core.errors import UserError
from pipeline.core.records import Question, Trajectory, WeightedExample
from pipeline.core.renderer import Renderer
from pipeline.core.retrieval import Searched, corpus_paths, passages
from pipeline.core.run import Json
from retriever_service.passages.corpus import read_corpus


@dataclass(frozen=True, slots=True)
class WarmUpSource:
    """What the warm-up is made from: questions, and the trajectories of them if those are ready."""

    questions: Sequence[Question]
    ready: Sequence[Trajectory] | None = None


def load_warm_up_source(config: Config, train: Sequence[Question], renderer: Renderer) -> WarmUpSource:
    """Read and check everything that a warm-up needs, before anything expensive.

    Args:
        train: the run's training questions, used where `warmup.sources` names no others.

    Returns:
        the ready trajectories of `warmup.trajectories`, else `warm_up_questions`.

    Raises:
        UserError: no question has the supervision that synthesis needs, or a bad trajectory file.
    """
    warmup, root = config.warmup, config.data.root
    if warmup.trajectories is not None:
        ready = read_trajectories(Path(warmup.trajectories), renderer)
        files = (config.data.train, warmup.sources)
        known = [*train, *(q for paths in files for q in read_questions(paths, root=root))]
        if unknown := sorted({t.question_id for t in ready} - {q.id for q in known}):
            raise UserError(
                f"{warmup.trajectories} has trajectories of {len(unknown)} questions that are neither in data.train "
                f"nor in warmup.sources ({', '.join(unknown[:5])}); name the files that they come from there"
            )
        return WarmUpSource(known, ready)
    return WarmUpSource(warm_up_questions(config, train))


def warm_up_questions(config: Config, train: Sequence[Question]) -> list[Question]:
    """A sample of `warmup.questions` questions with gold supervision, of `warmup.sources` or else of `train`.

    Raises:
        UserError: no question has the supervision that synthesis needs, or nothing has the gold passages.
        RetrieverError: a source of the gold passages that cannot be read.
    """
    _check_gold_source(config)
    warmup, root = config.warmup, config.data.root
    pool = read_questions(warmup.sources, root=root) if warmup.sources else train
    supervised = [q for q in pool if is_supervised(q)]
    if not supervised:
        raise UserError(
            f"warmup.questions is {warmup.questions}, but none of {len(pool)} questions names its supporting "
            "passages; give questions that do (docs/formats.md), or set warmup.questions=0"
        )
    return sample_questions(supervised, warmup.questions, config.seed)


def _check_gold_source(config: Config) -> None:
    """Servers give passages for queries, not for ids: the gold ones are read from the corpus."""
    if config.retriever.url is None:
        return
    if not config.data.corpus:
        raise UserError(
            "warmup.questions needs the gold passages, and retriever.url cannot give passages by id: set data.corpus "
            "to the corpus that is served, or name ready trajectories (warmup.trajectories), or set warmup.questions=0"
        )
    for path in corpus_paths(config):
        next(read_corpus([path]))


async def warm_up_examples(
    config: Config,
    source: WarmUpSource,
    renderer: Renderer,
    retrieve: Retrieve,
    searched: Searched,
    cache: Path,
) -> tuple[list[WeightedExample], Json]:
    """Examples of weight 1, and how they came about.

    Args:
        retrieve: the run's retriever.
        searched, cache: see `synthesise_warm_up`.

    Raises:
        UserError: no trajectory came of the questions.
    """
    if source.ready is not None:
        return warmup_examples(source.ready, source.questions, renderer), {"trajectories": len(source.ready)}
    result = await synthesise_warm_up(config, source.questions, renderer, retrieve, searched, cache)
    return warmup_examples(result.trajectories, source.questions, renderer), result.statistics()


async def synthesise_warm_up(
    config: Config,
    questions: Sequence[Question],
    renderer: Renderer,
    retrieve: Retrieve,
    searched: Searched,
    cache: Path,
) -> WarmupResult:
    """Trajectories of the questions; see `pipeline.core.data.warmup`.

    Args:
        searched: what the retriever searches, for the gold passages.
        cache: file of the answers of `warmup.rewrite_endpoint`, which a second synthesis does not ask for again.

    Raises:
        UserError: no trajectory came of them.
    """
    warmup = config.warmup
    wanted = {hop.supporting_id for q in questions for hop in q.decomposition if hop.supporting_id}
    wanted |= {passage_id for q in questions for passage_id in q.supporting_ids}
    gold = {passage.id: passage for passage in passages(config, searched) if passage.id in wanted}
    async with AsyncExitStack() as stack:
        rewriter = None
        if warmup.rewrite_endpoint is not None:
            rewriter = await stack.enter_async_context(
                Rewriter(warmup.rewrite_endpoint, warmup.rewrite_model, cache)
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
            f"warmup.questions is {warmup.questions}, but none of {len(questions)} questions could be made into a "
            f"trajectory: {dict(result.skipped)}; give questions with decompositions or supporting passages "
            "(docs/formats.md), or set warmup.questions=0"
        )
    return result
