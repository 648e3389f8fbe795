"""Search over a built index.

Guarantees:
- hits are sorted by score (descending), equal scores by corpus row; a passage comes at most once;
- `min(k, number of passages)` hits, fewer only where an approximate index finds fewer: FAISS's placeholder id
  -1 never becomes a passage;
- with a Flat index on the CPU, hits and scores do not depend on which other queries are searched at the same
  time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from retriever_service.corpus import Corpus, Passage
from retriever_service.errors import RetrieverError

if TYPE_CHECKING:
    from retriever_service.encoder import EncoderSpec, TextEncoder, Vectors
    from retriever_service.index import LoadEncoder, Manifest

CACHED_QUERIES = 100_000
_TIE_MARGIN = 16


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a search found, with its similarity score (higher is closer)."""

    passage: Passage
    score: float


class Searcher(Protocol):
    """Anything that finds passages for queries."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The best `k` passages of each query, best first."""
        ...


def check_request(queries: Sequence[str], k: int) -> None:
    """Refuse what no searcher can answer.

    Raises:
        RetrieverError: k < 1, or a query that is not a string of valid Unicode.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise RetrieverError(f"k must be a whole number of at least 1, got {k!r}")
    if isinstance(queries, str):
        raise RetrieverError("queries must be a list of strings, got one string")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise RetrieverError(f"query {number} must be a string, is {type(query).__name__}")
        try:
            query.encode()
        except UnicodeEncodeError as error:
            raise RetrieverError(f"query {number} is not valid Unicode: {error}") from error


class DenseSearcher:
    """Encodes queries and searches a FAISS index. Use one instance from one thread at a time.

    The vectors of the last `cached_queries` different queries are kept: agents that sample the same question
    ask the same sub-queries again and again.
    """

    def __init__(
        self, manifest: Manifest, index: Any, corpus: Corpus, encoder: TextEncoder, *, cached_queries: int
    ) -> None:
        import faiss

        self.manifest = manifest
        self.cache_hits = 0
        """Queries answered without encoding since the start."""
        self._index = index
        self._corpus = corpus
        self._encoder = encoder
        self._cached_queries = cached_queries
        self._cache: OrderedDict[str, Vectors] = OrderedDict()
        self._is_flat = isinstance(index, faiss.IndexFlat)

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
        load_encoder: LoadEncoder | None = None,
    ) -> DenseSearcher:
        """Open a built index with its encoder.

        Args:
            encoder: None for the encoder that the index was built with. Another one is refused unless it is
                the same encoder in another place.
            device: torch device name. On "cuda..." the index is searched there too if FAISS has GPU support.
            num_threads: CPU threads of torch and FAISS (FAISS: of the calling thread only); None leaves them
                alone.
            search_parameters: of approximate indexes, in FAISS's notation: "nprobe=64", "efSearch=128".
            load_encoder: how a spec becomes an encoder; None for sentence-transformers.

        Raises:
            RetrieverError: a missing or damaged index, an encoder or search parameters that do not fit.
        """
        # Imported here: `Hit` and `Searcher` are used where neither FAISS nor an encoder is needed.
        import faiss

        from retriever_service.encoder import Encoder
        from retriever_service.index import check_encoder, open_index

        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
            faiss.omp_set_num_threads(num_threads)
        manifest, index, corpus = open_index(index_dir)
        loaded = (load_encoder or Encoder.load)(encoder or manifest.encoder, device)
        check_encoder(manifest, loaded, index_dir)
        if search_parameters:
            space: Any = faiss.ParameterSpace()
            try:
                space.set_index_parameters(index, search_parameters)
            except RuntimeError as error:
                raise RetrieverError(
                    f"search parameters {search_parameters!r} do not fit a {manifest.factory} index: nprobe=N is for "
                    "IVF indexes, efSearch=N for HNSW ones, a Flat one has none"
                ) from error
        if device.startswith("cuda") and faiss.get_num_gpus() > 0:
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = True
            options.shard = True
            index = faiss.index_cpu_to_all_gpus(index, options)
        return cls(manifest, index, corpus, loaded, cached_queries=cached_queries)

    @property
    def fingerprint(self) -> str:
        """Identity of everything that the results depend on: passages, encoder, index."""
        return self.manifest.fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The best `k` passages of each query; see the module's guarantees.

        Raises:
            RetrieverError: k < 1, or a query that is not a string of valid Unicode.
        """
        check_request(queries, k)
        if not queries:
            return []
        return self.search_vectors(self._encode(queries), k)

    def search_vectors(self, vectors: Vectors, k: int) -> list[list[Hit]]:
        """As `search`, for query vectors [n, dimension] of the index's encoder.

        Raises:
            RetrieverError: k < 1, or vectors of another dimension or with infinite or undefined values.
        """
        check_request([], k)
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dimension:
            raise RetrieverError(f"vectors of shape {vectors.shape}, expected [n, {self.manifest.dimension}]")
        if not np.isfinite(vectors).all():
            raise RetrieverError("vectors with infinite or undefined values cannot be searched for")
        if len(vectors) == 0:
            return []
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        # The margin lets passages with equal scores around rank k be ordered by row, as everywhere else.
        scores, rows = self._index.search(vectors, min(k + _TIE_MARGIN, self.manifest.count))
        if self._is_flat:
            scores = self._exact_scores(vectors, rows)
        return [self._hits(row_scores, row_ids, k) for row_scores, row_ids in zip(scores, rows, strict=True)]

    def _exact_scores(self, vectors: Vectors, rows: npt.NDArray[np.int64]) -> Vectors:
        """Inner products [n, m] of the found rows, to the last bit whatever the batch.

        FAISS computes them by blocks of queries, so that its own last bits depend on the size of the batch.
        """
        found = self._index.reconstruct_batch(rows.ravel()).reshape(*rows.shape, -1)
        # In float64, explicitly: einsum's own casting works through buffers whose borders move with the
        # batch.
        exact: npt.NDArray[np.float64] = np.einsum(
            "nmd,nd->nm", found.astype(np.float64), vectors.astype(np.float64)
        )
        return exact.astype(np.float32)

    def _hits(self, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> list[Hit]:
        order = np.lexsort((rows, -scores))
        best = [i for i in order if rows[i] >= 0][:k]
        return [Hit(self._corpus[int(rows[i])], float(scores[i])) for i in best]

    def _encode(self, queries: Sequence[str]) -> Vectors:
        """Vectors [n, dimension]: from the cache where possible, else every distinct query encoded once."""
        distinct = dict.fromkeys(queries)
        vectors = {query: self._cache[query] for query in distinct if query in self._cache}
        missing = [query for query in distinct if query not in vectors]
        self.cache_hits += len(queries) - len(missing)
        if missing:
            vectors.update(zip(missing, self._encoder.encode_queries(missing), strict=True))
        for query in distinct:
            self._cache[query] = vectors[query]
            self._cache.move_to_end(query)
        while len(self._cache) > self._cached_queries:
            self._cache.popitem(last=False)
        return np.stack([vectors[query] for query in queries])
