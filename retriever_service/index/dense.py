"""The first stage over vectors: queries are encoded; all segments of an index are searched and results merged.

Guarantees:
- with Flat segments on the CPU, rows and scores are those of an exact search, to the last bit whatever other
  queries are searched at the same time, and however the rows are divided into segments;
- FAISS's placeholder id -1 stays -1 and never becomes a row of another segment;
- scores are inner products, also those of a segment (an imported one) that FAISS searches by squared distances: for
  vectors of length 1, and only such are imported, these are 2 - 2 times the inner product; where codes change the
  length, as nearly as they keep it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.encoding.encoder import TextEncoder, Vectors
from retriever_service.errors import RetrieverError
from retriever_service.passages.ranked import NO_ROW, NO_SCORE, Mask, Ranked

_TIE_MARGIN = 16
_MOST_ON_GPU = 2_048
"""Hits per query that FAISS finds on a GPU."""


class QueryVectors:
    """Vectors of queries. Use one instance from one thread at a time.

    Those of the last `num_kept` different queries are kept: agents that sample the same question ask the same
    sub-queries again and again.
    """

    def __init__(self, encoder: TextEncoder, num_kept: int) -> None:
        self.cache_hits = 0
        """Queries answered without encoding since the start."""
        self._encoder = encoder
        self._num_kept = num_kept
        self._kept: OrderedDict[str, Vectors] = OrderedDict()

    def of(self, queries: Sequence[str]) -> Vectors:
        """Vectors [n, dimension]: kept ones where possible, else every distinct query encoded once."""
        distinct = dict.fromkeys(queries)
        vectors = {query: self._kept[query] for query in distinct if query in self._kept}
        missing = [query for query in distinct if query not in vectors]
        self.cache_hits += len(queries) - len(missing)
        if missing:
            vectors.update(zip(missing, self._encoder.encode_queries(missing), strict=True))
        for query in distinct:
            self._kept[query] = vectors[query]
            self._kept.move_to_end(query)
        while len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)
        return np.stack([vectors[query] for query in queries])


class VectorSearch:
    """Searches segments, whose rows are numbered one behind the other. Use one instance from one thread at a time.

    Args:
        device: torch device name; on "cuda..." the segments are searched there if FAISS has GPU support.
    """

    def __init__(self, segments: Sequence[faiss.Index], device: str = "cpu") -> None:
        self.search_parameters = ""
        self._starts = np.cumsum([0, *(segment.ntotal for segment in segments)])
        self._on_gpu = device.startswith("cuda") and faiss.get_num_gpus() > 0
        self._segments = _to_gpus(segments) if self._on_gpu else tuple(segments)
        self._by_distance = [segment.metric_type == faiss.METRIC_L2 for segment in segments]
        self._is_flat = [not self._on_gpu and isinstance(s, faiss.IndexFlat) for s in segments]

    def set_parameters(self, search_parameters: str) -> None:
        """Set how thoroughly approximate segments are searched, in FAISS's notation: "nprobe=64", "efSearch=128".

        Flat segments among them (passages that were added later) have no parameters.

        Raises:
            RetrieverError: no segment has such a parameter.
        """
        self.search_parameters = search_parameters
        if not search_parameters:
            return
        space: Any = faiss.GpuParameterSpace() if self._on_gpu else faiss.ParameterSpace()
        failures = []
        for segment, is_flat in zip(self._segments, self._is_flat, strict=True):
            if is_flat and not all(self._is_flat):
                continue
            try:
                space.set_index_parameters(segment, search_parameters)
            except RuntimeError as error:
                failures.append(error)
        if failures:
            raise RetrieverError(
                f"search parameters {search_parameters!r} do not fit this index: nprobe=N is for IVF indexes, "
                "efSearch=N for HNSW ones, a Flat one has none"
            ) from failures[0]

    def search(self, vectors: Vectors, depth: int, allowed: Mask | None = None) -> Ranked:
        """The best `depth` rows of query vectors [n, dimension] among the allowed ones.

        Raises:
            RetrieverError: vectors of another dimension or with infinite or undefined values.
        """
        dimension = self._segments[0].d
        if vectors.ndim != 2 or vectors.shape[1] != dimension:
            raise RetrieverError(f"vectors of shape {vectors.shape}, expected [n, {dimension}]")
        if not np.isfinite(vectors).all():
            raise RetrieverError("vectors with infinite or undefined values cannot be searched for")
        if len(vectors) == 0:
            return Ranked(np.empty((0, depth), np.float32), np.empty((0, depth), np.int64))
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        parts = [
            self._search_segment(number, vectors, depth, allowed) for number in range(len(self._segments))
        ]
        return Ranked.best(
            np.concatenate([part.scores for part in parts], axis=1),
            np.concatenate([part.rows for part in parts], axis=1),
            depth,
        )

    def _search_segment(self, number: int, vectors: Vectors, depth: int, allowed: Mask | None) -> Ranked:
        """Rows are those of the whole index."""
        segment, start = self._segments[number], int(self._starts[number])
        mask = None if allowed is None else allowed[start : start + segment.ntotal]
        # The margin lets passages with equal scores around the last rank be ordered by row, as everywhere else.
        wanted = min(depth + _TIE_MARGIN, segment.ntotal)
        selection = None if mask is None or self._on_gpu else _only(segment, mask)
        if mask is not None and selection is None:
            wanted = self._deep_enough(wanted, mask)
        scores, rows = segment.search(vectors, wanted, params=selection)
        if mask is not None:
            rows = np.where((rows >= 0) & mask[rows], rows, NO_ROW)
        if self._is_flat[number]:
            scores = _exact_scores(segment, vectors, rows)
        elif self._by_distance[number]:
            scores = np.float32(1) - scores / np.float32(2)
        found = rows >= 0
        return Ranked(
            np.where(found, scores, NO_SCORE).astype(np.float32), np.where(found, rows + start, NO_ROW)
        )

    def _deep_enough(self, wanted: int, mask: Mask) -> int:
        """So many rows that all that may not come could be dropped from them."""
        depth = min(len(mask), wanted + int(len(mask) - mask.sum()))
        if self._on_gpu and depth > _MOST_ON_GPU:
            raise RetrieverError(
                f"FAISS finds at most {_MOST_ON_GPU} passages per query on a GPU; with this filter, or so many "
                f"deleted passages, {depth} would be needed: search on the CPU, or build the index again"
            )
        return depth


def _to_gpus(segments: Sequence[faiss.Index]) -> tuple[faiss.Index, ...]:
    """One segment after the other, in float16, so that no full-precision copy is ever on a GPU."""
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    return tuple(faiss.index_cpu_to_all_gpus(segment, options) for segment in segments)


def _only(index: Any, mask: Mask) -> Any:
    """FAISS's search parameters that look at the rows of `mask` only; None if the index has no such search."""
    cast = faiss.downcast_index(index)
    library: Any = faiss  # its annotations are those of C++, before Python's keyword arguments
    selector = library.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    if isinstance(cast, faiss.IndexPreTransform):
        inner = _only(cast.index, mask)
        return None if inner is None else library.SearchParametersPreTransform(index_params=inner)
    if isinstance(cast, faiss.IndexHNSW):
        return library.SearchParametersHNSW(sel=selector, efSearch=cast.hnsw.efSearch)
    if isinstance(cast, faiss.IndexIVFPQ):
        return library.IVFPQSearchParameters(sel=selector, nprobe=cast.nprobe)
    if isinstance(cast, faiss.IndexIVF):
        return library.SearchParametersIVF(sel=selector, nprobe=cast.nprobe)
    if isinstance(cast, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return library.SearchParameters(sel=selector)
    return None


def _exact_scores(index: faiss.Index, vectors: Vectors, rows: npt.NDArray[np.int64]) -> Vectors:
    """Inner products [n, m] of the found rows, to the last bit whatever the batch.

    FAISS computes them by blocks of queries, so that its own last bits depend on the size of the batch.
    """
    found = index.reconstruct_batch(np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
    # In float64, explicitly: einsum's own casting works through buffers whose borders move with the batch.
    exact: npt.NDArray[np.float64] = np.einsum(
        "nmd,nd->nm", found.astype(np.float64), vectors.astype(np.float64)
    )
    return exact.astype(np.float32)
