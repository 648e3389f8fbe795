"""How large an index will be, from its FAISS factory string.

Guarantees:
- a factory string means what FAISS makes of it: an empty index is made of it and asked for the size of its codes,
  lists and links;
- everything counts: vectors, ids, links, centroids, codebooks and matrices; only the headers of the file, a few
  hundred bytes, are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import faiss

from retriever_service.errors import RetrieverError
from retriever_service.index.filling import expected_links

_ID, _LIST_SIZE, _LEVEL, _OFFSET, _LINK, _FLOAT = 8, 8, 4, 8, 4, 4
_LOCK, _VISITED, _CELL = 4, 16, 4
"""While an index is filled: a lock per vector of a graph, and a byte per thread; the number of a vector's list."""
_LIST_IN_MEMORY = 112
"""Two vectors (of codes and ids) on the heap, beyond what is in the file."""
_RANGED_SQ = (
    faiss.ScalarQuantizer.QT_8bit,
    faiss.ScalarQuantizer.QT_6bit,
    faiss.ScalarQuantizer.QT_4bit,
)
_CODECS = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexScalarQuantizer, faiss.IndexPQ)
_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
_GRAPHS = (faiss.IndexHNSWFlat, faiss.IndexHNSWSQ, faiss.IndexHNSWPQ)
_SUPPORTED = "Flat, SQ4, SQ6, SQ8, SQfp16, PQm, IVFn[_HNSWm],CODEC and HNSWm,CODEC, behind OPQm_d or PCAd"


@dataclass(frozen=True, slots=True)
class IndexSize:
    """Bytes of an index, in its file and elsewhere: so many per vector, and so many once."""

    per_vector: float
    once: int = 0
    building_per_vector: float = 0.0
    """Beyond those of the file, while vectors are added."""
    building_once: int = 0
    private_per_vector: float = 0.0
    """Of those of the file: what FAISS copies into each process that maps it."""
    private_once: int = 0
    gpu_per_vector: float | None = None
    """On GPUs in float16, over all of them; None where FAISS cannot search such an index there."""
    gpu_once: int = 0
    """On each GPU."""
    num_lists: int = 0
    """Cells of an inverted file; 0 without one."""
    least_training_rows: int = 0
    """0 if there is nothing to train."""
    inner_dimension: int = 0
    """Of the vectors behind the transforms."""
    is_graph: bool = False

    def file(self, rows: int) -> int:
        return round(self.once + rows * self.per_vector)

    def building(self, rows: int) -> int:
        """Memory of the index while it is filled, if no buffer is larger than what comes into it."""
        return round(self.file(rows) + self.building_once + rows * self.building_per_vector)

    def private(self, rows: int) -> int:
        """Memory of each process that has the file mapped."""
        return round(self.private_once + rows * self.private_per_vector)


def empty_index(factory: str, dimension: int) -> Any:
    """What FAISS makes of a factory string, for inner products.

    Product quantisers are trained for no other search than by their codes' products: by default FAISS goes on to
    renumber the codes for a search by Hamming distances, more than a second per sub-quantiser, which changes nothing
    here.

    Raises:
        RetrieverError: it is not one, or does not fit the dimension.
    """
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip() or str(error)
        raise RetrieverError(
            f"index factory {factory!r} does not fit {dimension} dimensions: {reason}. There are {_SUPPORTED}"
        ) from error
    _leave_polysemous_training_out(index)
    return index


def _leave_polysemous_training_out(index: Any) -> None:
    cast = faiss.downcast_index(index)
    if isinstance(cast, faiss.IndexPreTransform):
        _leave_polysemous_training_out(cast.index)
    elif isinstance(cast, faiss.IndexHNSW):
        _leave_polysemous_training_out(cast.storage)
    elif hasattr(cast, "do_polysemous_training"):
        cast.do_polysemous_training = False


def index_size(factory: str, dimension: int) -> IndexSize:
    """The sizes of an index of this factory string.

    Raises:
        RetrieverError: the factory string is not one, or of a kind whose size is not known here.
    """
    index = empty_index(factory, dimension)
    try:
        return _size(index)
    except NotImplementedError as error:
        raise RetrieverError(
            f"index factory {factory!r}: the size of {error} is not known. There are {_SUPPORTED}"
        ) from error


def _size(index: Any) -> IndexSize:
    index = faiss.downcast_index(index)
    if type(index) is faiss.IndexPreTransform:
        chain: Any = index.chain
        transforms = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
        return _behind(_size(index.index), transforms)
    if type(index) in _LISTS:
        return _of_lists(index)
    if type(index) in _GRAPHS:
        return _of_graph(index)
    if type(index) in _CODECS:
        once, rows = _codec(index)
        is_half = hasattr(index, "sq") and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return IndexSize(
            per_vector=index.code_size,
            once=once,
            private_once=once,
            gpu_per_vector=2.0 * index.d if is_half or isinstance(index, faiss.IndexFlat) else None,
            least_training_rows=rows,
            inner_dimension=index.d,
        )
    raise NotImplementedError(type(index).__name__)


def _codec(index: Any) -> tuple[int, int]:
    """(bytes of what is learnt about the codes, rows that learning it takes)."""
    if hasattr(index, "pq"):
        return index.pq.centroids.size() * _FLOAT, index.pq.ksub
    if hasattr(index, "sq") and index.sq.qtype in _RANGED_SQ:
        return 2 * index.sq.d * _FLOAT, 1
    return 0, 0


def _of_lists(index: Any) -> IndexSize:
    quantizer = _size(index.quantizer)
    once, rows = _codec(index)
    learnt = quantizer.file(index.nlist) + once
    on_gpu = isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat)
    return IndexSize(
        per_vector=index.code_size + _ID,
        once=learnt + index.nlist * _LIST_SIZE,
        building_per_vector=_CELL,
        building_once=index.nlist * _LIST_IN_MEMORY,
        private_once=quantizer.private(index.nlist) + once + index.nlist * (_LIST_IN_MEMORY + _LIST_SIZE),
        gpu_per_vector=index.code_size + _ID if on_gpu else None,
        gpu_once=learnt if on_gpu else 0,
        num_lists=index.nlist,
        least_training_rows=max(index.nlist, rows),
        inner_dimension=index.d,
    )


def _of_graph(index: Any) -> IndexSize:
    codec = faiss.downcast_index(index.storage)
    storage = _size(codec)
    # Distances between all pairs of centroids, which linking needs; not in the file.
    table = codec.pq.M * codec.pq.ksub**2 * _FLOAT if hasattr(codec, "pq") else 0
    return IndexSize(
        per_vector=storage.per_vector + _LEVEL + _OFFSET + _LINK * expected_links(index.hnsw),
        once=storage.once,
        building_per_vector=_LOCK + _VISITED,
        building_once=table,
        private_per_vector=_LEVEL + _OFFSET,
        private_once=storage.private_once + table,
        least_training_rows=storage.least_training_rows,
        inner_dimension=index.d,
        is_graph=True,
    )


def _behind(inner: IndexSize, transforms: list[Any]) -> IndexSize:
    """The sizes with those of the transforms that vectors go through first."""
    once, rows = 0, 0
    for transform in transforms:
        if isinstance(transform, faiss.PCAMatrix):
            once += (transform.d_in**2 + 2 * transform.d_in) * _FLOAT
        if isinstance(transform, faiss.OPQMatrix | faiss.PCAMatrix | faiss.RandomRotationMatrix):
            bias = transform.d_out if transform.have_bias else 0
            once += (transform.d_in * transform.d_out + bias) * _FLOAT
        elif not isinstance(transform, faiss.NormalizationTransform):
            raise NotImplementedError(type(transform).__name__)
        if isinstance(transform, faiss.OPQMatrix):
            rows = 256  # centroids per sub-quantiser of its own
        elif not transform.is_trained:
            rows = max(rows, 1)
    return dataclasses.replace(
        inner,
        once=inner.once + once,
        private_once=inner.private_once + once,
        least_training_rows=max(inner.least_training_rows, rows),
    )
