"""How fast this machine encodes passages, and trains, fills and searches an index: measured in a few seconds.

The measured index has the asked-for centroids, codes and links, but few vectors; times for many are extrapolated.
Expect them to be right within a factor of two, but for the training of product quantisers, which is over-estimated
(up to six times with rotations), and for graphs that do not reach the recall aimed at, whose tuning takes longer
(docs/results.md).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retriever_service.building.tuning import NUM_QUERIES
from retriever_service.encoding.encoder import TextEncoder, Vectors
from retriever_service.files import record_file, writing
from retriever_service.index.index_size import empty_index
from retriever_service.passages.corpus import Passage

_TRAINING_ROWS = 10_240
_FIRST_ADDED, _MOST_ADDED = 1_024, 32_768
_ADDING_S = 1.5
_ASSIGNED_ROWS = 2_048
_OPQ_ITERATIONS = 2
"""Rotations that are learnt, of 50."""
_PQ_ITERATIONS = 5
"""Of k-means, of 25."""
_CODEC_TRAINING_ROWS = 65_536
"""FAISS learns product quantisers and rotations from at most so many rows."""
_FILE_BYTES = 64 << 20
_SCANNING_QUERIES = 64
_TRIED_SHARE = 0.1
"""Of the cells, with all values of nprobe that tuning tries together; from 1,000,000 clustered vectors."""
_TRIED_EF_SEARCH, _EF_CONSTRUCTION = 1_000, 40
"""The same for graphs, if the recall that is aimed at is reached at 256; and FAISS's default for adding."""
_NUM_CLUSTERS, _SPREAD = 1_024, 0.8


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted times."""

    encode: float | None
    """None if it was not measured."""
    train: float
    add: float
    files: float
    """Writing the index with its passages, and reading it once for its checksums."""
    recall: float
    """Measuring an approximate index against exact search, and tuning it."""

    @property
    def total(self) -> float:
        return (self.encode or 0.0) + self.train + self.add + self.files + self.recall


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates of this machine for one factory string and dimension."""

    encode_s: float | None
    """Per passage."""
    cluster_s: float
    """Of finding the cells of an inverted file, per row of the training sample."""
    learn_once_s: float
    learn_s: float
    """Of learning codes and rotations: once, and per row of the training sample."""
    add_s: float
    """Per vector added to an index of `add_rows` vectors."""
    add_rows: int
    add_doubling_s: float
    """More per vector for every doubling of the index; above 0 for graphs."""
    file_s: float
    """Per byte written, and read again for its checksum."""
    recall_s: float
    """Of measuring and tuning, per vector; 0 for exact indexes."""
    recall_adds: float
    """Of tuning a graph: searches, in additions of a vector."""

    def seconds(self, encoded: int, segments: Sequence[int], training_rows: int, file_bytes: int) -> Seconds:
        """Times for `encoded` passages, segments of so many rows, and files of so many bytes in all."""
        train = 0.0
        if training_rows:
            learning_rows = min(training_rows, _CODEC_TRAINING_ROWS)
            train = self.learn_once_s + self.learn_s * learning_rows + self.cluster_s * training_rows
        return Seconds(
            encode=None if self.encode_s is None else self.encode_s * encoded,
            train=train,
            add=sum(rows * self._add_s(rows) for rows in segments),
            files=self.file_s * file_bytes,
            recall=sum(rows * self.recall_s + self.recall_adds * self._add_s(rows) for rows in segments),
        )

    def _add_s(self, rows: int) -> float:
        """Per vector, on average over the filling of a segment: the mean of log2 up to n is log2(n) - log2(e)."""
        doublings = math.log2(rows / self.add_rows) - math.log2(math.e)
        return self.add_s + self.add_doubling_s * max(0.0, doublings)


def calibrate(
    factory: str,
    dimension: int,
    directory: str | Path | None = None,
    *,
    encoder: TextEncoder | None = None,
    passages: Sequence[Passage] = (),
) -> Calibration:
    """Measure this machine.

    Args:
        directory: on the disk that the index will be on; None for the one of temporary files.
        encoder, passages: measure encoding too, on a few hundred typical passages.

    Raises:
        RetrieverError: a factory string that is none, or does not fit the dimension.
    """
    index = empty_index(factory, dimension)
    vectors = clustered_vectors(_MOST_ADDED, dimension, seed=0)
    cluster_s = _give_centroids(index)
    learn_once_s, learn_s = (0.0, 0.0) if index.is_trained else _learning(index, vectors)
    add_s, add_rows, add_doubling_s = _adding(index, vectors)
    recall_s, recall_adds = _measuring(index, vectors)
    return Calibration(
        encode_s=None if encoder is None else _encoding(encoder, passages),
        cluster_s=cluster_s,
        learn_once_s=learn_once_s,
        learn_s=learn_s,
        add_s=add_s,
        add_rows=add_rows,
        add_doubling_s=add_doubling_s,
        file_s=_files(directory),
        recall_s=recall_s,
        recall_adds=recall_adds,
    )


def clustered_vectors(count: int, dimension: int, seed: int) -> Vectors:
    """Unit vectors around centres that are the same for every seed: inner products within a cluster are about 0.6."""
    shape = (_NUM_CLUSTERS, dimension)
    centres = _unit(np.random.default_rng(_NUM_CLUSTERS).standard_normal(shape, dtype=np.float32))
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, dimension), dtype=np.float32) * (_SPREAD / math.sqrt(dimension))
    return _unit(centres[rng.integers(_NUM_CLUSTERS, size=count)] + noise)


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _give_centroids(index: Any) -> float:
    """Make random vectors the centroids of an inverted file; returns what finding real ones takes per row."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return 0.0
    centroids = clustered_vectors(ivf.nlist, ivf.d, seed=1)
    ivf.quantizer.add(centroids)
    assigner = faiss.IndexFlatIP(ivf.d)
    assigner.add(centroids)
    rows = clustered_vectors(_ASSIGNED_ROWS, ivf.d, seed=2)
    iterations: int = ivf.cp.niter
    return iterations * _elapsed(lambda: assigner.assign(rows, 1)) / len(rows)


def _learning(index: Any, vectors: Vectors) -> tuple[float, float]:
    """(seconds once, seconds per row) of training everything but the centroids. Leaves the index trained."""
    few = _train(faiss.clone_index(index), vectors[:_TRAINING_ROWS])
    many = _train(index, vectors[: 2 * _TRAINING_ROWS])
    per_row = max(0.0, many - few) / _TRAINING_ROWS
    return max(0.0, few - per_row * _TRAINING_ROWS), per_row


def _train(index: Any, vectors: Vectors) -> float:
    """Train on a small sample; returns the time, scaled up to as many iterations as FAISS would make."""
    seconds, inner = 0.0, faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        chain: Any = inner.chain
        for number in range(chain.size()):
            transform: Any = faiss.downcast_VectorTransform(chain.at(number))
            scale = 1.0
            if isinstance(transform, faiss.OPQMatrix):
                # The first rotation is learnt with more iterations of k-means than the others.
                wanted = transform.niter_pq_0 + (transform.niter - 1) * transform.niter_pq
                scale = wanted / (_OPQ_ITERATIONS * transform.niter_pq)
                transform.niter_pq_0, transform.niter = transform.niter_pq, _OPQ_ITERATIONS
                quantiser = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
                quantiser.cp.min_points_per_centroid = 1
                transform.pq = quantiser
            if not transform.is_trained:
                seconds += scale * _elapsed(partial(transform.train, vectors))
            vectors = transform.apply(vectors)
        inner = faiss.downcast_index(inner.index)
    scale = 1.0
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1  # a small sample will do here: no warnings
        scale = inner.pq.cp.niter / _PQ_ITERATIONS
        inner.pq.cp.niter = _PQ_ITERATIONS
    seconds += scale * _elapsed(lambda: inner.train(vectors))
    index.is_trained = True
    return seconds


def _adding(index: Any, vectors: Vectors) -> tuple[float, int, float]:
    """(seconds per vector, vectors in the index then, more seconds per vector for every doubling)."""
    stop = time.perf_counter() + _ADDING_S
    costs: list[float] = []
    sizes: list[int] = []
    end = _FIRST_ADDED
    while end <= len(vectors) and (len(costs) < 2 or time.perf_counter() < stop):
        batch = vectors[index.ntotal : end]
        costs.append(_elapsed(partial(index.add, batch)) / len(batch))
        sizes.append(index.ntotal)
        end *= 2
    if not _is_graph(index):
        return costs[-1], sizes[-1], 0.0
    doubling, _ = np.polyfit(np.log2(sizes[1:]), costs[1:], 1) if len(costs) > 2 else (0.0, 0.0)
    return costs[-1], sizes[-1], max(0.0, float(doubling))


def _measuring(index: Any, vectors: Vectors) -> tuple[float, float]:
    """(seconds per vector, additions of a vector) that `tuning` takes for a filled index."""
    if isinstance(index, faiss.IndexFlat):
        return 0.0, 0.0
    queries = vectors[:_SCANNING_QUERIES]
    scale = NUM_QUERIES / len(queries)
    exact_s = scale * _elapsed(lambda: queries @ vectors.T > 1.0) / len(vectors)
    if _is_graph(index):
        return exact_s, NUM_QUERIES * _TRIED_EF_SEARCH / _EF_CONSTRUCTION
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = ivf.nlist
    scan_s = scale * _elapsed(lambda: index.search(queries, 10)) / index.ntotal
    return exact_s + scan_s * (1.0 if ivf is None else _TRIED_SHARE), 0.0


def _is_graph(index: Any) -> bool:
    cast = faiss.downcast_index(index)
    if isinstance(cast, faiss.IndexPreTransform):
        return _is_graph(cast.index)
    return isinstance(cast, faiss.IndexHNSW)


def _encoding(encoder: TextEncoder, passages: Sequence[Passage]) -> float:
    """Seconds per passage, after a first few that warm the encoder up."""
    for _ in encoder.encode_passages(passages[:32]):
        pass
    return _elapsed(lambda: sum(len(part) for part in encoder.encode_passages(passages))) / len(passages)


def _files(directory: str | Path | None) -> float:
    """Seconds per byte of writing a file to the disk and reading it again for its checksum."""
    block = np.random.default_rng(0).bytes(_FILE_BYTES)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        path = Path(scratch) / "file"

        def write_and_read() -> None:
            with writing(path) as file:
                file.write(block)
            record_file(path)

        return _elapsed(write_and_read) / len(block)


def _elapsed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
