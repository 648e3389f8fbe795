"""Filling an index by slices: the same bytes as adding everything, and no more memory than the index."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from retriever_service.building.calibration import clustered_vectors
from retriever_service.index import filling
from retriever_service.index.filling import fill

ROWS, LARGE = 3_000, 300_000


@pytest.fixture
def one_thread() -> Iterator[None]:
    """FAISS links graphs in parallel: only a single thread does it alike every time."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "SQfp16",
        "SQ8",
        "PQ4x4",
        "IVF32,Flat",
        "IVF32,SQ8",
        "IVF32_HNSW8,PQ4x4",
        "PCA16,IVF32,SQ8",
        "OPQ4_16,PQ4x4",
        "HNSW8,Flat",
        "HNSW8,SQ8",
    ],
)
def test_a_filled_index_is_the_one_that_faiss_makes(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SLICE_ROWS", 700)
    vectors = clustered_vectors(ROWS, 24, seed=0)
    empty = faiss.index_factory(24, factory, faiss.METRIC_INNER_PRODUCT)
    empty.train(vectors)
    by_slices, added = faiss.clone_index(empty), faiss.clone_index(empty)
    fill(by_slices, lambda start, stop: vectors[start:stop], ROWS)
    for start in range(0, ROWS, 700):
        added.add(vectors[start : start + 700])
    assert by_slices.ntotal == ROWS
    np.testing.assert_array_equal(faiss.serialize_index(by_slices), faiss.serialize_index(added))


def test_no_rows_fill_nothing() -> None:
    index = faiss.index_factory(8, "Flat")
    fill(index, lambda start, stop: np.empty((0, 8), dtype=np.float32), 0)
    assert index.ntotal == 0


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF8,Flat"])
def test_filling_takes_the_memory_of_the_index_and_of_slices(factory: str) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        grown, size = pool.submit(_fill_a_large_one, factory).result()
    assert grown < 1.15 * size + 4 * filling.SLICE_ROWS * 128 * 4


def _fill_a_large_one(factory: str) -> tuple[int, int]:
    """(bytes that memory grew by at most, bytes of the index)."""
    index = faiss.index_factory(128, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(clustered_vectors(1_000, 128, seed=0))
    rng = np.random.default_rng(0)

    def read(start: int, stop: int) -> npt.NDArray[np.float32]:
        return rng.random((stop - start, 128), dtype=np.float32)

    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    fill(index, read, LARGE)
    grown = _resident("VmHWM") - before
    return grown, len(faiss.serialize_index(index))


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
