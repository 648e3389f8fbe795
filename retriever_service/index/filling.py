"""Filling an index without ever holding more than the index and a slice of vectors.

Left alone, FAISS doubles its buffers as vectors are added, and holds the old one beside the new one meanwhile: up to
twice the index. It has no call that reserves room, but a buffer keeps its memory when it is emptied: here each is
given its final size first, then emptied, then filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np

from retriever_service.encoding.encoder import Vectors

SLICE_ROWS = 16_384
"""Vectors that are read and added together."""
_MARGIN = 6
"""Standard deviations of the number of links above its mean that there is room for."""

Read = Callable[[int, int], Vectors]
"""(start, stop) -> vectors [stop - start, dimension] of these rows."""


def fill(index: Any, read: Read, rows: int) -> None:
    """Add vectors 0 to `rows` - 1 to an index that is trained and empty; the result is that of `index.add`.

    An inverted file reads them twice: first to learn how long its lists will be.
    """
    index = faiss.downcast_index(index)
    transforms = []
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        transforms = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
        inner = faiss.downcast_index(index.index)

    def slices() -> Iterator[tuple[slice, Vectors]]:
        for start in range(0, rows, SLICE_ROWS):
            stop = min(start + SLICE_ROWS, rows)
            vectors = np.ascontiguousarray(read(start, stop))
            for transform in transforms:
                vectors = transform.apply(vectors)
            yield slice(start, stop), vectors

    if isinstance(inner, faiss.IndexIVF):
        cells = np.empty(rows, dtype=np.int32)
        for part, vectors in slices():
            cells[part] = inner.quantizer.assign(vectors, 1)[:, 0]
        _reserve_lists(inner, np.bincount(cells, minlength=inner.nlist))
        for part, vectors in slices():
            assigned = cells[part].astype(np.int64)
            inner.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(assigned))
    else:
        _reserve(inner, rows)
        for _, vectors in slices():
            inner.add(vectors)
    index.ntotal = inner.ntotal


def expected_links(hnsw: Any) -> float:
    """Places for links per vector of a graph: its level is drawn, and every level has its own."""
    shares = faiss.vector_to_array(hnsw.assign_probas)
    return math.fsum(float(share) * hnsw.cum_nb_neighbors(level + 1) for level, share in enumerate(shares))


def _reserve(index: Any, rows: int) -> None:
    if isinstance(index, faiss.IndexHNSW):
        _reserve(faiss.downcast_index(index.storage), rows)
        hnsw: Any = index.hnsw
        links = rows * expected_links(hnsw) + _MARGIN * math.sqrt(rows * hnsw.nb_neighbors(1))
        for buffer, length in (
            (hnsw.neighbors, math.ceil(links)),
            (hnsw.levels, rows),
            (hnsw.offsets, rows + 1),
        ):
            filled = buffer.size()
            buffer.resize(length)
            buffer.resize(filled)
    elif isinstance(index, faiss.IndexFlatCodes):
        index.codes.resize(rows * index.code_size)
        index.codes.resize(0)


def _reserve_lists(ivf: Any, lengths: Any) -> None:
    lists = ivf.invlists
    for cell, length in enumerate(lengths):
        lists.resize(cell, int(length))
    for cell in range(len(lengths)):
        lists.resize(cell, 0)
