"""An index that FAISS, or a program around it, wrote: opened, and looked at before anything is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from faiss.contrib.factory_tools import reverse_index_factory

from retriever_service.encoding.encoder import Vectors
from retriever_service.errors import RetrieverError
from retriever_service.index.store import read_segment

Rows = npt.NDArray[np.int64]

_PYSERINI_INDEX, _PYSERINI_IDS = "index", "docid"
_METRICS = (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2)


@dataclass(frozen=True, slots=True)
class ReadyIndex:
    """Memory-mapped; inverted files take 8 bytes per vector of memory, so that vectors are found by row.

    Guarantee: rows are 0, 1, 2, ..., and the vector of each can be told as far as its code kept it.
    """

    file: Path
    index: Any
    ids: Path | None
    """File with the id of each row's passage; None where the rows are those of the corpus."""

    @classmethod
    def open(cls, source: Path, ids: Path | None) -> ReadyIndex:
        """Open a file of FAISS, or Pyserini's folder with `index` and, where `ids` is None, `docid`.

        Raises:
            RetrieverError: there is none, it is cut short, empty, or of a kind that is not searched here.
        """
        file = source / _PYSERINI_INDEX if source.is_dir() else source
        if not file.is_file():
            raise RetrieverError(
                f"there is no index {file}; name a file that FAISS wrote, or Pyserini's folder"
            )
        if ids is None and source.is_dir() and (source / _PYSERINI_IDS).is_file():
            ids = source / _PYSERINI_IDS
        if ids is not None and not ids.is_file():
            raise RetrieverError(f"there is no file of ids {ids}")
        index = read_segment(
            file,
            "if it is one part of a file, join them all first: cat part_* > joined.index; else get or build it again",
        )
        ready = cls(file, index, ids)
        ready._check_kind()
        return ready

    @property
    def factory(self) -> str:
        """FAISS's factory string, or the name of the class where there is none."""
        try:
            return _factory_of(self.index)
        except NotImplementedError:
            return type(faiss.downcast_index(self.index)).__name__

    @property
    def manifest(self) -> Any:
        """Count and dimension, where `tuning` looks for them."""
        return SimpleNamespace(count=self.index.ntotal, dimension=self.index.d)

    def read(self, start: int, stop: int, /) -> Vectors:
        return self.sample(np.arange(start, stop))

    def sample(self, ascending_rows: Rows, /) -> Vectors:
        vectors: Vectors = self.index.reconstruct_batch(ascending_rows)
        return vectors

    def coded(self, vectors: Vectors) -> Vectors:
        """What the index would keep of these vectors."""
        kind: Any = faiss.downcast_index(self.index)
        codec = faiss.downcast_index(kind.storage) if isinstance(kind, faiss.IndexHNSW) else kind
        kept: Vectors = codec.sa_decode(codec.sa_encode(np.ascontiguousarray(vectors)))
        return kept

    def _check_kind(self) -> None:
        """Refuse what would be searched with another meaning than ours."""
        index, file = self.index, self.file
        if isinstance(faiss.downcast_index(index), faiss.IndexIDMap):
            raise RetrieverError(
                f"{file} maps its rows to ids of its own (IndexIDMap); write what it holds "
                "(faiss.write_index(faiss.downcast_index(index.index), FILE)), and the ids "
                "(faiss.vector_to_array(index.id_map)) as lines of a file for --ids"
            )
        if index.metric_type not in _METRICS:
            raise RetrieverError(
                f"{file} is searched by FAISS's metric {index.metric_type}; only inner products (0), and L2 distances "
                "(1) of vectors of length 1, are searched here"
            )
        if not index.ntotal:
            raise RetrieverError(f"{file} holds no vectors")
        try:
            if (lists := faiss.try_extract_index_ivf(index)) is not None:
                lists.make_direct_map()
                if (faiss.vector_to_array(lists.direct_map.array) < 0).any():
                    raise RuntimeError("some rows have no vector")
            self.coded(self.sample(np.array([0, index.ntotal - 1])))
        except RuntimeError as error:
            raise RetrieverError(
                f"{file}: its vectors cannot be told row by row, so that nothing says whether they belong to this "
                f"corpus ({str(error).splitlines()[-1]:.200}). Build it with add, not add_with_ids, and of a kind "
                "whose vectors can be reconstructed"
            ) from error


def _factory_of(index: Any) -> str:
    name_of: Any = reverse_index_factory
    kind = faiss.downcast_index(index)
    if type(kind) is faiss.IndexPreTransform:
        chain: Any = kind.chain
        transform, inner = faiss.downcast_VectorTransform(chain.at(0)), faiss.downcast_index(kind.index)
        # In a file an OPQ matrix is any linear transform.
        if chain.size() == 1 and type(transform) is faiss.LinearTransform and hasattr(inner, "pq"):
            return f"OPQ{inner.pq.M}_{transform.d_out},{name_of(inner)}"
    return str(name_of(kind))
