"""Searching a built index: first stage, filters, near-duplicates, re-ranking.

Guarantees:
- hits are sorted by score (descending), equal scores by corpus row; a passage comes at most once;
- `min(k, number of matching passages)` hits, fewer only where an approximate index, or BM25, finds fewer:
  FAISS's placeholder id -1 never becomes a passage;
- a query of nothing but white space finds nothing, whatever the method;
- with Flat segments on the CPU, hits and scores do not depend on which other queries are searched at the same
  time;
- an update that has returned is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder, Vectors
from retriever_service.errors import RetrieverError
from retriever_service.index.bm25 import Bm25
from retriever_service.passages.corpus import Passage
from retriever_service.passages.duplicates import drop_duplicates
from retriever_service.passages.filters import MetadataColumns
from retriever_service.passages.hits import (
    DEFAULT_OPTIONS,
    Hit,
    SearchOptions,
    check_request,
    normalise_query,
)
from retriever_service.passages.ranked import Mask, Ranked
from retriever_service.search.fusion import reciprocal_rank_fusion
from retriever_service.search.rerank import Reranker

# What loads FAISS is imported where an index is opened or changed: many who import this class never do, such as the
# command line and the workers that ask another process.
if TYPE_CHECKING:
    from retriever_service.index.dense import QueryVectors, VectorSearch
    from retriever_service.index.store import Manifest, OpenIndex

FUSION_DEPTH = 100
"""Hits of each ranking that a hybrid search fuses, at least."""

CACHED_QUERIES = 100_000
_FIRST_QUERY = "first search"


class SearchEngine:
    """Everything that answers queries over one index. Use one instance from one thread at a time.

    `open` is how to get one.
    """

    def __init__(
        self,
        index: OpenIndex,
        encoder: TextEncoder,
        query_vectors: QueryVectors,
        reranker: Reranker | None,
        make_stages: Callable[[OpenIndex], tuple[VectorSearch, Bm25 | None]],
    ) -> None:
        self.on_stage: Callable[[str, float], None] | None = None
        """Told the name (`encode`, `search`, `fetch`, `rerank`) and seconds of every stage of every search."""
        self._encoder = encoder
        self._query_vectors = query_vectors
        self._reranker = reranker
        self._make_stages = make_stages
        self._use(index)

    @classmethod
    def open(
        cls,
        index_dir: str | Path,
        *,
        encoder: EncoderSpec | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        search_parameters: str = "",
        cached_queries: int = CACHED_QUERIES,
        reranker: str | None = None,
        load_encoder: LoadEncoder | None = None,
    ) -> SearchEngine:
        """Open a built index with its encoder.

        Args:
            encoder: None for the encoder that the index was built with. Another one is refused unless it is
                the same encoder in another place.
            device: torch device name. On "cuda..." the index is searched there too if FAISS has GPU support.
            num_threads: CPU threads of torch and FAISS (FAISS: of the calling thread only); None leaves them
                alone.
            search_parameters: of approximate indexes, in FAISS's notation: "nprobe=64", "efSearch=128"; empty
                for those that were found when the index was built.
            cached_queries: vectors of so many recent queries are kept.
            reranker: a cross-encoder (directory or hub name) for `SearchOptions.rerank`.
            load_encoder: how a spec becomes an encoder; None for sentence-transformers.

        Raises:
            RetrieverError: a missing or damaged index, an encoder or search parameters that do not fit.
        """
        import faiss

        # Before any request: where no file can be opened, an import fails, and may leave halves of modules.
        import retriever_service.index.updates  # noqa: F401
        from retriever_service.index.dense import QueryVectors, VectorSearch
        from retriever_service.index.store import check_encoder, open_index

        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
            faiss.omp_set_num_threads(num_threads)
        index = open_index(index_dir)
        loaded = (load_encoder or Encoder.load)(encoder or index.manifest.encoder, device)
        check_encoder(index.manifest, loaded, index_dir)

        def make_stages(state: OpenIndex) -> tuple[VectorSearch, Bm25 | None]:
            vectors = VectorSearch(state.segments, device)
            vectors.set_parameters(search_parameters or state.manifest.search_parameters)
            words = state.manifest.bm25
            return vectors, None if words is None else Bm25.open(
                state.directory / words, num_threads=num_threads
            )

        queries = QueryVectors(loaded, cached_queries)
        return cls(
            index, loaded, queries, None if reranker is None else Reranker.open(reranker, device), make_stages
        )

    def _use(self, index: OpenIndex) -> None:
        self._index = index
        self._vectors, self._bm25 = self._make_stages(index)
        self._metadata = MetadataColumns(index.corpus)

    @property
    def manifest(self) -> Manifest:
        """Of the state that is being searched."""
        return self._index.manifest

    @property
    def fingerprint(self) -> str:
        """Identity of everything that the results depend on: passages, encoder, index, re-ranker."""
        reranker = "" if self._reranker is None else self._reranker.fingerprint
        return f"{self.manifest.fingerprint}{self._vectors.search_parameters}{reranker}"

    @property
    def cache_hits(self) -> int:
        """Queries whose vector needed no encoding."""
        return self._query_vectors.cache_hits

    # ---------------------------------------------------------------- search

    def search(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        """The best `k` passages of each query; see the module's guarantees.

        Raises:
            RetrieverError: k < 1, a query that is not a string of valid Unicode, or options that this index
                cannot fulfil.
        """
        check_request(queries, k)
        self._check_options(options)
        if not queries:
            return []
        normalised = [normalise_query(query) for query in queries]
        answerable = [query for query in normalised if query]
        if not answerable:
            return [[] for _ in queries]
        allowed = self._allowed(options)
        k = min(k, len(self._index.corpus))
        wanted = min(max(k, options.rerank) + len(options.exclude), len(self._index.corpus))
        # Near-duplicates are few as a rule: so many more, and all over again where that was not enough.
        depth = 2 * wanted if options.distinct else wanted
        candidates = iter(self._candidates(answerable, depth, allowed, options))
        return [
            self._rerank(query, next(candidates)[: max(k, options.rerank)], options)[:k] if query else []
            for query in normalised
        ]

    def search_vectors(self, vectors: Vectors, k: int) -> list[list[Hit]]:
        """As `search` with the default options, for query vectors [n, dimension] of the index's encoder.

        Raises:
            RetrieverError: k < 1, or vectors of another dimension or with infinite or undefined values.
        """
        check_request([], k)
        return self._hits(self._vectors.search(vectors, k, self._index.alive))

    def _check_options(self, options: SearchOptions) -> None:
        if options.method != "dense" and self._bm25 is None:
            raise RetrieverError(
                f"method {options.method!r} needs a word index, and {self._index.directory} was built without; "
                "build it with --bm25, or search with method 'dense'"
            )
        if options.rerank and self._reranker is None:
            raise RetrieverError("re-ranking was asked for, but no re-ranker is loaded; name a cross-encoder")

    def _allowed(self, options: SearchOptions) -> Mask | None:
        """Rows that may come, [count]; None for all."""
        alive = self._index.alive
        if options.where is None:
            return alive
        matching = options.where.mask(self._metadata)
        return matching if alive is None else matching & alive

    def _candidates(
        self, queries: Sequence[str], depth: int, allowed: Mask | None, options: SearchOptions
    ) -> list[list[Hit]]:
        """At least max(k, rerank) hits of each query where there are so many, without what must not come."""
        ranked = self._first_stage(queries, depth, allowed, options)
        candidates = []
        for query, hits in zip(queries, self._hits(ranked), strict=True):
            kept = [hit for hit in hits if hit.passage.id not in options.exclude]
            if options.distinct:
                kept = drop_duplicates(kept)
                if len(hits) == depth and len(kept) < depth // 2:
                    (kept,) = self._candidates([query], 2 * depth, allowed, options)
            candidates.append(kept)
        return candidates

    def _first_stage(
        self, queries: Sequence[str], depth: int, allowed: Mask | None, options: SearchOptions
    ) -> Ranked:
        if options.method == "dense":
            return self._dense(queries, depth, allowed)
        assert self._bm25 is not None  # see _check_options
        if options.method == "bm25":
            with self._stage("search"):
                return self._bm25.search(queries, depth, allowed)
        deep = max(depth, FUSION_DEPTH)
        dense = self._dense(queries, deep, allowed)
        with self._stage("search"):
            return reciprocal_rank_fusion([dense, self._bm25.search(queries, deep, allowed)]).top(depth)

    def _dense(self, queries: Sequence[str], depth: int, allowed: Mask | None) -> Ranked:
        with self._stage("encode"):
            vectors = self._query_vectors.of(queries)
        with self._stage("search"):
            return self._vectors.search(vectors, depth, allowed)

    def _hits(self, ranked: Ranked) -> list[list[Hit]]:
        corpus = self._index.corpus
        with self._stage("fetch"):
            return [
                [
                    Hit(corpus[int(row)], float(score))
                    for score, row in zip(scores, rows, strict=True)
                    if row >= 0
                ]
                for scores, rows in zip(ranked.scores, ranked.rows, strict=True)
            ]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.on_stage is not None:
            self.on_stage(name, time.perf_counter() - start)

    def _rerank(self, query: str, hits: list[Hit], options: SearchOptions) -> list[Hit]:
        if not options.rerank or self._reranker is None:
            return hits
        with self._stage("rerank"):
            scores = self._reranker.scores([(query, hit.passage) for hit in hits])
        # Python's sort is stable: equal scores keep the order of the first stage.
        order = sorted(range(len(hits)), key=lambda i: -scores[i])
        return [Hit(hits[i].passage, float(scores[i])) for i in order]

    def first_search(self) -> None:
        """Do before the first request what would make it slow: read pages, compile, import.

        Counts and keeps nothing.
        """
        pa.array([_FIRST_QUERY])  # its first array imports pandas
        vectors = self._encoder.encode_queries([_FIRST_QUERY])
        self._vectors.search(vectors, 1)
        if self._bm25 is not None:
            self._bm25.first_search()
        if self._reranker is not None:
            self._reranker.scores([(_FIRST_QUERY, self._index.corpus[0])])

    def close(self) -> None:
        """There is nothing to do: files and memory are given back with the object."""

    # ---------------------------------------------------------------- updates

    def add(self, passages: Sequence[Passage]) -> int:
        """Add passages to the index; returns how many it has now. See `updates.add_passages`."""
        from retriever_service.index.updates import add_passages

        add_passages(self._index.directory, passages, self._encoder)
        self.refresh()
        return self.manifest.num_passages

    def delete(self, ids: Sequence[str]) -> int:
        """Delete passages from the index; returns how many it has now. See `updates.delete_passages`."""
        from retriever_service.index.updates import delete_passages

        delete_passages(self._index.directory, ids)
        self.refresh()
        return self.manifest.num_passages

    def info(self) -> dict[str, Any]:
        """What is being searched, for people and monitoring."""
        manifest = self.manifest
        return {
            "passages": manifest.num_passages,
            "generation": manifest.generation,
            "dimension": manifest.dimension,
            "factory": manifest.factory,
            "segments": len(manifest.segments),
            "search_parameters": self._vectors.search_parameters,
            "encoder": manifest.encoder.model,
            "methods": ["dense"] if self._bm25 is None else ["dense", "bm25", "hybrid"],
            "rerank": self._reranker is not None,
            "corpus": list(manifest.corpus_sources),
        }

    def refresh(self) -> bool:
        """Go over to the newest state of the index, if another process made one; True if so.

        Raises:
            RetrieverError: the new state is damaged, or of another encoder; the old one is searched on.
        """
        from retriever_service.index.store import check_encoder, open_index, read_manifest

        if read_manifest(self._index.directory) == self.manifest:
            return False
        index = open_index(self._index.directory)
        check_encoder(index.manifest, self._encoder, index.directory)
        self._use(index)
        return True
