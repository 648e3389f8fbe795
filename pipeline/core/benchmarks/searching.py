"""One retriever of a benchmark on one corpus: the retriever's own stages, each asked in its own words.

BM25, the encoder and the re-ranker are those of `retriever_service`. What is added is how a query and its instruction
are put together, which differs from stage to stage.

Guarantees:
- without an instruction a stage is asked the query as it stands, whichever arm it is: nothing is put in front of it;
- line breaks of a format reach the encoder;
- a re-ranker is given the candidates of the first stage, and its scores are what is ranked by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.core.benchmarks.corpora import BenchmarkCorpus
from pipeline.core.benchmarks.queries import Query
from pipeline.core.benchmarks.spec import INSTRUCTION_FORMAT, WORDS_FORMAT, Arm, SearchConfig
from retriever_service.encoding.encode_job import Progress
from retriever_service.encoding.encoder import EncoderSpec, LoadEncoder, TextEncoder, lasting_name
from retriever_service.index.bm25 import Bm25
from retriever_service.index.dense import VectorSearch
from retriever_service.index.store import open_index
from retriever_service.passages.ranked import Ranked
from retriever_service.search.engine import FUSION_DEPTH
from retriever_service.search.fusion import reciprocal_rank_fusion
from retriever_service.search.rerank import Reranker

Ranking = list[tuple[str, float]]
"""(passage id, score), best first."""
_AT_ONCE = 64
"""Queries that are searched together."""


def asked(query: Query, arm: Arm, query_format: str, instruction_format: str) -> str:
    """What a stage is asked."""
    if arm == "with" and query.instruction:
        return instruction_format.format(instruction=query.instruction, query=query.text)
    return query_format.format(query=query.text)


def encoder_spec(config: SearchConfig) -> EncoderSpec | None:
    """The encoder of a retriever; None where it has none."""
    if config.encoder_name is None:
        return None
    return EncoderSpec(
        lasting_name(config.encoder_name),
        config.query_prefix,
        config.passage_prefix,
        max_length=config.max_tokens,
        dtype=config.dtype,
    )


class DenseSearch:
    """Exact search by the vectors of one encoder."""

    def __init__(self, index: Path, encoder: TextEncoder, device: str = "cpu") -> None:
        self._encoder = encoder
        self._vectors = VectorSearch(open_index(index).segments, device)

    def search(self, queries: Sequence[str], depth: int) -> Ranked:
        """The best `depth` rows of the corpus for each query."""
        return self._vectors.search(self._encoder.encode_queries(queries), depth)


class TaskSearcher:
    """Ranks the passages of one corpus. What it stands on is built when it is made.

    Args:
        load: how an encoder is loaded.
        on_progress: told of the encoding of a corpus.
    """

    def __init__(
        self,
        config: SearchConfig,
        corpus: BenchmarkCorpus,
        *,
        depth: int,
        load: LoadEncoder,
        device: str = "cpu",
        reranker: Reranker | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self._config, self._reranker = config, reranker
        self._depth = depth
        self._passages = corpus.passages()
        self._words = None if config.method == "dense" else Bm25.open(corpus.words())
        self._dense: DenseSearch | None = None
        spec = encoder_spec(config)
        if spec is not None:
            index = corpus.vectors(spec, load, device, on_progress)
            self._dense = DenseSearch(index, load(spec, device), device)

    def rank(
        self, queries: Sequence[Query], arm: Arm, on_queries: Callable[[int], None] = lambda count: None
    ) -> list[Ranking]:
        """The best `depth` passages of each query, fewer where BM25 finds fewer.

        Args:
            on_queries: told of every number of further queries that are ranked.
        """
        rankings: list[Ranking] = []
        for start in range(0, len(queries), _AT_ONCE):
            part = queries[start : start + _AT_ONCE]
            rankings += self._rank(part, arm)
            on_queries(len(part))
        return rankings

    def _rank(self, queries: Sequence[Query], arm: Arm) -> list[Ranking]:
        config = self._config
        depth = self._depth if self._reranker is None else config.candidates
        depth = min(depth, len(self._passages))
        ranked = self._first_stage(queries, arm, depth)
        rankings = [
            [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
            for rows, scores in zip(ranked.rows, ranked.scores, strict=True)
        ]
        if self._reranker is not None:
            texts = self._texts(queries, arm, INSTRUCTION_FORMAT)
            rankings = [self._reranked(text, found) for text, found in zip(texts, rankings, strict=True)]
        return [
            [(self._passages[row].id, score) for row, score in found[: self._depth]] for found in rankings
        ]

    def _texts(self, queries: Sequence[Query], arm: Arm, default: str) -> list[str]:
        given = self._config.instruction_format or default
        return [asked(query, arm, self._config.query_format, given) for query in queries]

    def _first_stage(self, queries: Sequence[Query], arm: Arm, depth: int) -> Ranked:
        stages = []
        deep = depth if self._words is None or self._dense is None else max(depth, FUSION_DEPTH)
        if self._dense is not None:
            stages.append(self._dense.search(self._texts(queries, arm, INSTRUCTION_FORMAT), deep))
        if self._words is not None:
            stages.append(self._words.search(self._texts(queries, arm, WORDS_FORMAT), deep, None))
        return stages[0] if len(stages) == 1 else reciprocal_rank_fusion(stages).top(depth)

    def _reranked(self, text: str, found: list[tuple[int, float]]) -> list[tuple[int, float]]:
        assert self._reranker is not None
        if not found:
            return []
        scores = self._reranker.scores([(text, self._passages[row]) for row, _ in found])
        # Python's sort is stable: equal scores keep the order of the first stage.
        order = sorted(range(len(found)), key=lambda place: -scores[place])
        return [(found[place][0], float(scores[place])) for place in order]
