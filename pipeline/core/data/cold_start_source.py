"""Where a run's cold-start examples come from: a file of ready trajectories, or synthesis from gold supervision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.agents.program import Retrieve
from pipeline.core.config import ColdStartConfig, DataConfig, RetrieverConfig
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


@dataclass(frozen=True, slots=True)
class ColdStartMaker:
    """Makes cold-start examples as a configuration says.

    Args:
        retriever: of the run; says where the gold passages are.
        max_length: longest context in tokens.
        seed: of the run.
    """

    cold_start: ColdStartConfig
    data: DataConfig
    retriever: RetrieverConfig
    renderer: Renderer
    max_length: int
    seed: int

    def source(self, train: Sequence[Question]) -> ColdStartSource:
        """Read and check everything that a cold start needs, before anything expensive.

        Args:
            train: the run's training questions, used where `cold_start.sources` names no others.

        Returns:
            the ready trajectories of `cold_start.trajectories`, else what `questions` gives.

        Raises:
            UserError: no question has the supervision that synthesis needs, or a bad trajectory file.
        """
        if self.cold_start.trajectories is None:
            return ColdStartSource(self.questions(train))
        ready = read_trajectories(Path(self.cold_start.trajectories), self.renderer)
        files = (self.data.train, self.cold_start.sources)
        known = [*train, *(q for paths in files for q in read_questions(paths, root=self.data.root))]
        if unknown := sorted({t.question_id for t in ready} - {q.id for q in known}):
            raise UserError(
                f"{self.cold_start.trajectories} has trajectories of {len(unknown)} questions that are neither in "
                f"data.train nor in cold_start.sources ({', '.join(unknown[:5])}); name the files that they come from "
                "there"
            )
        return ColdStartSource(known, ready)

    def questions(self, train: Sequence[Question]) -> list[Question]:
        """A sample of `cold_start.questions` questions with gold supervision, of `cold_start.sources` or else of
        `train`.

        Raises:
            UserError: no question has the supervision that synthesis needs, or nothing has the gold passages.
            RetrieverError: a source of the gold passages that cannot be read.
        """
        self._check_gold_passages()
        wanted, sources = self.cold_start.questions, self.cold_start.sources
        pool = read_questions(sources, root=self.data.root) if sources else train
        supervised = [q for q in pool if is_supervised(q)]
        if not supervised:
            raise UserError(
                f"cold_start.questions is {wanted}, but none of {len(pool)} questions names its supporting passages; "
                "give questions that do (docs/formats.md), or set cold_start.questions=0"
            )
        return sample_questions(supervised, wanted, self.data.sample_seed(self.seed))

    async def examples(
        self, source: ColdStartSource, retrieve: Retrieve, searched: Searched, cache: Path
    ) -> tuple[list[Example], Json]:
        """Examples of weight 1, and how they came about.

        Args:
            retrieve: the run's retriever.
            searched, cache: see `synthesise`.

        Raises:
            UserError: no trajectory came of the questions.
        """
        if source.ready is not None:
            examples = supervised_examples(source.ready, source.questions, self.renderer)
            return examples, {"trajectories": len(source.ready)}
        result = await self.synthesise(source.questions, retrieve, searched, cache)
        return supervised_examples(result.trajectories, source.questions, self.renderer), result.statistics()

    async def synthesise(
        self, questions: Sequence[Question], retrieve: Retrieve, searched: Searched, cache: Path
    ) -> ColdStartResult:
        """Trajectories of the questions; see `pipeline.core.data.cold_start`.

        Args:
            searched: what the retriever searches, for the gold passages.
            cache: file of the answers of `cold_start.rewrite_endpoint`, which a second synthesis does not ask for
                again.

        Raises:
            UserError: no trajectory came of them.
        """
        cold_start = self.cold_start
        wanted = {hop.supporting_id for q in questions for hop in q.decomposition if hop.supporting_id}
        wanted |= {passage_id for q in questions for passage_id in q.supporting_ids}
        gold = {passage.id: passage for passage in passages(self.data, searched) if passage.id in wanted}
        async with AsyncExitStack() as stack:
            rewriter = None
            if cold_start.rewrite_endpoint is not None:
                rewriter = await stack.enter_async_context(
                    Rewriter(cold_start.rewrite_endpoint, cold_start.rewrite_model, cache)
                )
            result = await synthesise(
                questions,
                self.renderer,
                retrieve,
                gold.get,
                max_length=self.max_length,
                seed=self.seed,
                rewriter=rewriter,
            )
        if not result.trajectories:
            raise UserError(
                f"cold_start.questions is {cold_start.questions}, but none of {len(questions)} questions could be made "
                f"into a trajectory: {dict(result.skipped)}; give questions with decompositions or supporting passages "
                "(docs/formats.md), or set cold_start.questions=0"
            )
        return result

    def _check_gold_passages(self) -> None:
        """Servers give passages for queries, not for ids: the gold ones are read from the corpus."""
        if self.retriever.url is None:
            return
        if not self.data.corpus:
            raise UserError(
                "cold_start.questions needs the gold passages, and retriever.url cannot give passages by id: set "
                "data.corpus to the corpus that is served, or name ready trajectories (cold_start.trajectories), or "
                "set cold_start.questions=0"
            )
        for path in corpus_paths(self.data):
            next(read_corpus([path]))
