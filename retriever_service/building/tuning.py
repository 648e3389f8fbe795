"""How much of an exact search an approximate one finds, and the least effort with which it finds enough.

Guarantees:
- recall is measured on passages of the corpus as queries, each without itself, never on anybody's test questions;
- a passage as near as one of the exact top k counts as found: copies of a text do not lower the recall;
- exact search reads the vectors by blocks: memory does not grow with the corpus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.encoding.encoder import Vectors
from retriever_service.errors import RetrieverError
from retriever_service.index.dense import VectorSearch
from retriever_service.index.store import FLAT, RecallPoint, Segment, read_segment
from retriever_service.machine import release_freed_memory
from retriever_service.passages.ranked import NO_ROW, Ranked

logger = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
"""[n, depth], -1 where nothing was found."""
Search = Callable[[Vectors, int, str], Rows]
"""(queries, depth, search parameters in FAISS's notation) -> rows of the corpus, best first."""

TARGET_RECALL = 0.95
NUM_QUERIES = 1_000
_RECALL_AT = 10
_SCORES_BYTES = 64 << 20
"""Of the scores of one block of rows, for all queries."""
_FIRST_BLOCK, LARGEST_BLOCK = 1_024, 16_384
_SAMPLED_ROWS = 16_384
_LARGEST_EF_SEARCH = 4_096
_TIE = 1e-5
"""Scores that differ by less, relatively, are equal: they are sums of float32."""
_FINENESS = 16
"""A parameter is found to within this share of itself: measuring recall is as dear as it is thorough."""
_PLATEAU = 1e-3
"""If doubling the effort gains less recall than this, more will not help."""


class _StoreManifest(Protocol):
    @property
    def count(self) -> int: ...
    @property
    def dimension(self) -> int: ...


class StoredVectors(Protocol):
    """What is needed of a `vectors.VectorStore`."""

    @property
    def manifest(self) -> _StoreManifest: ...
    def read(self, start: int, stop: int, /) -> Vectors: ...
    def sample(self, ascending_rows: npt.NDArray[np.int64], /) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class Tunable:
    """The parameter by which an index exchanges time for recall."""

    name: str
    smallest: int
    largest: int

    @classmethod
    def of(cls, index: faiss.Index) -> Tunable | None:
        """That of an index; None if it has no such parameter."""
        # Another name: what it is cast to does not keep the index alive.
        cast = faiss.downcast_index(index)
        if isinstance(cast, faiss.IndexPreTransform):
            return cls.of(cast.index)
        if isinstance(cast, faiss.IndexIVF):
            return cls("nprobe", 1, cast.nlist)
        if isinstance(cast, faiss.IndexHNSW):
            return cls("efSearch", 16, _LARGEST_EF_SEARCH)
        return None


@dataclass(frozen=True, slots=True)
class Sample:
    """Passages that serve as queries, and what an exact search finds for them besides themselves."""

    own_rows: npt.NDArray[np.int64]
    """[n]."""
    queries: Vectors
    scores: Vectors
    """[n, k], descending."""
    rows: Rows
    """[n, k]."""

    @property
    def k(self) -> int:
        return int(self.rows.shape[1])


@dataclass(frozen=True, slots=True)
class RecallReport:
    """What was measured, and what was chosen by it."""

    search_parameters: str
    """Chosen, in FAISS's notation; empty for an index without parameters."""
    reached: bool
    """Whether they reach the target."""
    points: tuple[RecallPoint, ...]
    """Everything that was tried, by increasing effort."""


def draw_sample(store: StoredVectors, k: int, *, num_queries: int = NUM_QUERIES, seed: int = 0) -> Sample:
    """Draw passages as queries and find their exact neighbours.

    Raises:
        RetrieverError: the corpus has no k other passages.
    """
    count = store.manifest.count
    if not 1 <= k < count:
        raise RetrieverError(
            f"recall at {k} cannot be measured on {count} passages; k must be 1 to {count - 1}"
        )
    chosen = np.random.default_rng(seed).choice(count, min(num_queries, count), replace=False)
    own_rows = np.sort(chosen).astype(np.int64)
    queries = store.sample(own_rows)
    scores, rows = exact_neighbours(store, queries, k + 1)
    others = _others(rows, own_rows, k)
    return Sample(
        own_rows,
        queries,
        np.take_along_axis(scores, others, axis=1),
        np.take_along_axis(rows, others, axis=1),
    )


def exact_neighbours(store: StoredVectors, queries: Vectors, k: int) -> tuple[Vectors, Rows]:
    """Scores and rows [n, min(k, count)] of an exact search: best first, equal scores in row order.

    Memory: about 200 MB for 1,000 queries, whatever the corpus.
    """
    count, n = store.manifest.count, len(queries)
    k = min(k, count)
    best_scores = np.full((n, k), -np.inf, dtype=np.float32)
    best_rows = np.full((n, k), -1, dtype=np.int64)
    largest = max(1, min(LARGEST_BLOCK, _SCORES_BYTES // (4 * max(1, n))))
    start, block = 0, min(_FIRST_BLOCK, largest)
    while start < count:
        stop = min(start + block, count)
        scores = queries @ store.read(start, stop).T
        # Few survive the comparison once the first blocks are seen, so that sorting them costs nothing.
        query, column = np.nonzero(scores > best_scores[:, -1:])
        of = np.concatenate([np.repeat(np.arange(n), k), query])
        all_scores = np.concatenate([best_scores.ravel(), scores[query, column]])
        all_rows = np.concatenate([best_rows.ravel(), column + start])
        order = np.lexsort((all_rows, -all_scores, of))
        first = np.searchsorted(of[order], np.arange(n))
        best = order[first[:, None] + np.arange(k)]
        best_scores, best_rows = all_scores[best], all_rows[best]
        start, block = stop, min(2 * block, largest)
    return best_scores, best_rows


def measure_recall(
    store: StoredVectors, sample: Sample, search: Search, search_parameters: str
) -> RecallPoint:
    """Recall at 1, 10 and k (of those up to k) of a search with these parameters."""
    found = search(sample.queries, sample.k + 1, search_parameters)
    found = np.take_along_axis(found, _others(found, sample.own_rows, sample.k), axis=1)
    scores = _exact_scores(store, sample, found)
    recall = {}
    for cutoff in sorted({1, 10, sample.k}):
        if cutoff <= sample.k:
            worst = sample.scores[:, cutoff - 1 : cutoff]
            right = scores[:, :cutoff] >= worst - _TIE * np.abs(worst)
            recall[str(cutoff)] = float(right.mean())
    return RecallPoint(search_parameters=search_parameters, recall=recall)


def tune(
    store: StoredVectors, sample: Sample, search: Search, parameter: Tunable | None, target: float
) -> RecallReport:
    """Find about the smallest value of `parameter` whose recall at k is at least `target`: by doubling, then bisection.

    Where no value reaches it (codes lose what no search finds again), the smallest one is chosen that comes within
    a thousandth of the best, and a warning logged.

    Raises:
        RetrieverError: a target outside 0 to 1.
    """
    if not 0.0 < target <= 1.0:
        raise RetrieverError(f"a recall of {target} cannot be aimed at; it is a share between 0 and 1")
    points: dict[int, RecallPoint] = {}

    def recall(value: int) -> float:
        if value not in points:
            words = "" if parameter is None else f"{parameter.name}={value}"
            points[value] = measure_recall(store, sample, search, words)
            logger.info(f"{words or 'search'}: recall {points[value].recall}")
        return points[value].recall[str(sample.k)]

    chosen = 0 if parameter is None else _smallest(recall, parameter, target)
    reached = recall(chosen) >= target
    if not reached:
        logger.warning(
            f"a recall of {target} at {sample.k} is out of reach: {recall(chosen):.3f} with the parameters chosen, "
            f"{points[chosen].search_parameters or 'none'}; an index with larger codes would find more"
        )
    return RecallReport(
        search_parameters=points[chosen].search_parameters,
        reached=reached,
        points=tuple(point for _, point in sorted(points.items())),
    )


def tune_segments(
    store: StoredVectors, directory: Path, segments: Sequence[Segment], target_recall: float, seed: int
) -> tuple[str, tuple[RecallPoint, ...]]:
    """How an approximate index is best searched, and what was measured; nothing of an exact one."""
    k = min(_RECALL_AT, store.manifest.count - 1)
    if segments[0].factory == FLAT or k < 1:
        return "", ()

    def search(queries: Vectors, depth: int, search_parameters: str) -> Rows:
        scores, rows, start = [], [], 0
        for segment in segments:
            # One at a time: what is mapped, and was read, counts as memory of this process.
            vectors = VectorSearch([read_segment(directory / segment.index_file)])
            vectors.set_parameters(search_parameters)
            part = vectors.search(queries, depth)
            scores.append(part.scores)
            rows.append(np.where(part.rows >= 0, part.rows + start, NO_ROW))
            start += segment.count
        return Ranked.best(np.concatenate(scores, axis=1), np.concatenate(rows, axis=1), depth).rows

    sample = draw_sample(store, k, seed=seed)
    release_freed_memory()
    tunable = Tunable.of(read_segment(directory / segments[0].index_file))
    report = tune(store, sample, search, tunable, target_recall)
    return report.search_parameters, report.points


def _smallest(recall: Callable[[int], float], parameter: Tunable, target: float) -> int:
    """The smallest value with a recall of at least `target`, or of nearly the best there is."""
    below, value = parameter.smallest - 1, parameter.smallest
    while recall(value) < target:
        doubled = min(2 * value, parameter.largest)
        if recall(doubled) < min(target, recall(value) + _PLATEAU):
            target = recall(doubled) - _PLATEAU
        else:
            below, value = value, doubled
    while value - below > max(1, value // _FINENESS):
        middle = (below + value) // 2
        if recall(middle) >= target:
            value = middle
        else:
            below = middle
    return value


def _others(rows: Rows, own_rows: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.intp]:
    """Columns [n, k] of the first k rows that are not the query's own."""
    return np.argsort(rows == own_rows[:, None], axis=1, kind="stable")[:, :k]


def _exact_scores(store: StoredVectors, sample: Sample, found: Rows) -> Vectors:
    """Inner products [n, k] of the queries with what was found for them; -inf where nothing was."""
    same = found[:, :, None] == sample.rows[:, None, :]
    known = np.take_along_axis(sample.scores, same.argmax(axis=2), axis=1)
    scores: Vectors = np.where(same.any(axis=2), known, -np.inf).astype(np.float32)
    query, column = np.nonzero(~same.any(axis=2) & (found >= 0))
    for start in range(0, len(query), _SAMPLED_ROWS):
        part = slice(start, start + _SAMPLED_ROWS)
        rows, position = np.unique(found[query[part], column[part]], return_inverse=True)
        vectors = store.sample(rows)[position]
        scores[query[part], column[part]] = np.einsum("md,md->m", vectors, sample.queries[query[part]])
    return scores
