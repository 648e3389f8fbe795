"""Exact neighbours, recall, and the search for the least effort, over vectors in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_service.building import tuning
from retriever_service.building.calibration import clustered_vectors
from retriever_service.building.tuning import (
    Rows,
    Sample,
    Search,
    Tunable,
    draw_sample,
    exact_neighbours,
    measure_recall,
    tune,
)
from retriever_service.errors import RetrieverError
from retriever_service.index.index_size import empty_index

Vectors = npt.NDArray[np.float32]


class MemoryStore:
    """Vectors in memory; records the largest block that was read."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.manifest = SimpleNamespace(count=len(vectors), dimension=vectors.shape[1])
        self.largest_read = 0

    def read(self, start: int, stop: int, /) -> Vectors:
        assert 0 <= start <= stop <= len(self.vectors)
        self.largest_read = max(self.largest_read, stop - start)
        return self.vectors[start:stop].copy()

    def sample(self, ascending_rows: npt.NDArray[np.int64], /) -> Vectors:
        assert (np.diff(ascending_rows) >= 0).all()
        return self.vectors[ascending_rows]


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore(clustered_vectors(8_000, 32, seed=0))


@pytest.fixture(scope="module")
def sample(store: MemoryStore) -> Sample:
    return draw_sample(store, 20, num_queries=200)


def search_in(index: Any) -> Search:
    def search(queries: Vectors, depth: int, parameters: str) -> Rows:
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        rows: Rows = index.search(queries, depth)[1]
        return rows

    return search


def filled(factory: str, vectors: Vectors) -> Any:
    index = empty_index(factory, vectors.shape[1])
    index.train(vectors)
    index.add(vectors)
    return index


# Small whole numbers: products are exact and many are equal.
_SMALL = st.integers(1, 60).flatmap(
    lambda count: st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=count, max_size=count)
)


@given(
    rows=_SMALL,
    queries=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=5),
    k=st.integers(1, 70),
)
@settings(deadline=None, max_examples=200)
def test_exact_neighbours_are_a_sort_of_all_products(rows: list[Any], queries: list[Any], k: int) -> None:
    vectors, asked = np.array(rows, dtype=np.float32), np.array(queries, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_FIRST_BLOCK", 2)
        patch.setattr(tuning, "LARGEST_BLOCK", 7)
        scores, found = exact_neighbours(MemoryStore(vectors), asked, k)
    products = asked @ vectors.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, expected, axis=1))


def test_exact_neighbours_read_the_corpus_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(clustered_vectors(40_000, 8, seed=1))
    exact_neighbours(store, store.vectors[:10], 5)
    assert store.largest_read == 16_384
    # Smaller ones for more queries, whose scores would not fit otherwise.
    monkeypatch.setattr(tuning, "_SCORES_BYTES", 4 * 100 * 50)
    smaller = MemoryStore(store.vectors[:2_000])
    exact_neighbours(smaller, store.vectors[:100], 5)
    assert smaller.largest_read == 50


def test_a_sample_leaves_out_the_query_itself(store: MemoryStore, sample: Sample) -> None:
    assert sample.rows.shape == sample.scores.shape == (200, 20)
    assert not (sample.rows == sample.own_rows[:, None]).any()
    np.testing.assert_array_equal(sample.queries, store.vectors[sample.own_rows])
    products = sample.queries @ store.vectors.T
    products[np.arange(200), sample.own_rows] = -np.inf
    np.testing.assert_allclose(sample.scores, -np.sort(-products, axis=1)[:, :20], rtol=1e-5)


def test_a_sample_is_the_same_for_the_same_seed(store: MemoryStore) -> None:
    first, again, other = (draw_sample(store, 3, num_queries=20, seed=seed).own_rows for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("k", [0, 8_000])
def test_more_neighbours_than_passages_are_refused(store: MemoryStore, k: int) -> None:
    with pytest.raises(RetrieverError, match=r"k must be 1 to 7999"):
        draw_sample(store, k)


def test_an_exact_index_has_a_recall_of_one(store: MemoryStore, sample: Sample) -> None:
    report = tune(store, sample, search_in(filled("Flat", store.vectors)), None, target=1.0)
    assert report.reached
    assert report.search_parameters == ""
    (point,) = report.points
    assert point.recall == {"1": 1.0, "10": 1.0, "20": 1.0}


def test_recall_is_the_share_of_the_exact_results_that_are_found(store: MemoryStore, sample: Sample) -> None:
    def half(queries: Vectors, depth: int, parameters: str) -> Rows:
        """The query itself, every other one of its neighbours, and nothing."""
        rows = np.full((len(queries), depth), -1)
        rows[:, 0] = sample.own_rows
        rows[:, 1:11] = sample.rows[:, 1::2]
        return rows

    assert measure_recall(store, sample, half, "").recall == {"1": 0.0, "10": 0.5, "20": 0.5}


def test_copies_of_a_passage_are_as_good_as_the_passage() -> None:
    distinct = clustered_vectors(100, 16, seed=3)
    store = MemoryStore(np.repeat(distinct, 10, axis=0))
    sample = draw_sample(store, 5, num_queries=50)

    def last_copies(queries: Vectors, depth: int, parameters: str) -> Rows:
        first = sample.own_rows // 10 * 10
        return first[:, None] + 9 - np.arange(depth)

    assert measure_recall(store, sample, last_copies, "").recall == {"1": 1.0, "5": 1.0}


@pytest.mark.parametrize("factory", ["IVF128,Flat", "PCA30,IVF128,Flat", "HNSW8,Flat", "IVF128_HNSW16,SQ8"])
def test_the_chosen_value_is_about_the_smallest_that_reaches_the_target(
    factory: str, store: MemoryStore, sample: Sample
) -> None:
    index = filled(factory, store.vectors)
    search, parameter = search_in(index), Tunable.of(index)
    assert parameter is not None
    target = 0.6 if factory.startswith("PCA") else 0.9
    report = tune(store, sample, search, parameter, target=target)
    assert report.reached
    name, value = report.search_parameters.split("=")
    assert name == parameter.name
    assert measure_recall(store, sample, search, report.search_parameters).recall["20"] >= target
    less = int(value) - max(1, int(value) // 16)
    if less >= parameter.smallest:
        assert measure_recall(store, sample, search, f"{name}={less}").recall["20"] < target


@given(
    thresholds=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    target=st.floats(0.01, 1.0),
    smallest=st.integers(1, 20),
    largest=st.integers(20, 300),
)
@settings(deadline=None, max_examples=300)
def test_any_rising_recall_is_tuned_to_about_its_smallest_value(
    thresholds: list[int], target: float, smallest: int, largest: int
) -> None:
    # Strictly rising by more than what counts as a plateau.
    def recall(value: int) -> float:
        steps = sum(threshold <= value for threshold in thresholds) / len(thresholds)
        return 0.5 * value / largest + 0.5 * steps

    chosen = tuning._smallest(recall, Tunable("x", smallest, largest), target)
    enough = [value for value in range(smallest, largest + 1) if recall(value) >= target]
    if enough:
        assert enough[0] <= chosen < enough[0] + max(1, chosen // 16)
    else:
        assert recall(largest) - recall(chosen) <= 2e-3


def test_a_target_out_of_reach_costs_no_more_than_what_helps(
    store: MemoryStore, sample: Sample, caplog: pytest.LogCaptureFixture
) -> None:
    index = filled("IVF128,PQ4", store.vectors)
    report = tune(store, sample, search_in(index), Tunable.of(index), target=0.999)
    assert not report.reached
    assert "a recall of 0.999 at 20 is out of reach" in caplog.text
    by_value = {point.search_parameters: point.recall["20"] for point in report.points}
    assert max(by_value.values()) - by_value[report.search_parameters] <= 0.002
    assert int(report.search_parameters.removeprefix("nprobe=")) < 128


def test_the_report_has_every_value_that_was_tried_in_order(store: MemoryStore, sample: Sample) -> None:
    index = filled("IVF128,Flat", store.vectors)
    report = tune(store, sample, search_in(index), Tunable.of(index), target=0.9)
    values = [int(point.search_parameters.removeprefix("nprobe=")) for point in report.points]
    assert values[:3] == [1, 2, 4]
    assert values == sorted(set(values))
    assert all(set(point.recall) == {"1", "10", "20"} for point in report.points)


@pytest.mark.parametrize(
    ("factory", "parameter"),
    [
        ("IVF128,Flat", Tunable("nprobe", 1, 128)),
        ("OPQ4_16,IVF32_HNSW8,PQ4", Tunable("nprobe", 1, 32)),
        ("HNSW16,SQ8", Tunable("efSearch", 16, 4_096)),
        ("Flat", None),
        ("SQ8", None),
        ("PCA16,PQ4", None),
    ],
)
def test_what_an_index_can_be_tuned_by(factory: str, parameter: Tunable | None) -> None:
    assert Tunable.of(faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)) == parameter


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, float("nan")])
def test_an_impossible_target_is_refused(target: float, store: MemoryStore, sample: Sample) -> None:
    with pytest.raises(RetrieverError, match="share between 0 and 1"):
        tune(store, sample, search_in(filled("Flat", store.vectors)), None, target=target)
