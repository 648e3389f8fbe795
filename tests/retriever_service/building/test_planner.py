"""Predicted sizes against indexes that FAISS really writes, and plans that keep to their bounds or are refused.

No corpus and no encoder: vectors are generated. Times are never looked at, only how they are extrapolated.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_service.building.calibration import Calibration, calibrate, clustered_vectors
from retriever_service.building.planner import MOST_SEGMENTS, check_fits, check_loads, plan_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.index_size import empty_index
from retriever_service.machine import available_memory
from retriever_service.passages.corpus import Passage
from tests.retriever_service.support import DIMENSION, HashEncoder

GIB = 1 << 30
WIKIPEDIA = 21_015_324
"""Passages of DPR's psgs_w100, which all published sizes are of; 768 dimensions."""
FACTORIES = [
    "Flat",
    "SQfp16",
    "SQ8",
    "SQ4",
    "PQ8",
    "PQ16x4",
    "IVF64,Flat",
    "IVF64,SQfp16",
    "IVF64,SQ8",
    "IVF64,PQ8",
    "IVF64_HNSW16,SQ8",
    "IVF64_HNSW16,PQ8",
    "HNSW32",
    "HNSW8,Flat",
    "HNSW16,SQ8",
    "HNSW16,PQ8",
    pytest.param("OPQ8_32,PQ8", marks=pytest.mark.chaos),
    pytest.param("OPQ8_16,IVF64,PQ8", marks=pytest.mark.chaos),
    "PCA16,Flat",
    "PCAR16,IVF64,SQ8",
    "L2norm,HNSW16,SQ8",
]


def written_bytes(factory: str, vectors: np.ndarray[Any, Any], path: Path) -> int:
    index = empty_index(factory, vectors.shape[1])
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path.stat().st_size


@pytest.mark.parametrize("factory", ["PQ8", "IVF16,PQ8", "HNSW16,PQ8", "OPQ8_16,IVF16,PQ8"])
def test_codes_are_not_renumbered_for_a_search_that_nobody_makes(factory: str) -> None:
    vectors = clustered_vectors(1_000, 32, seed=0)
    index = empty_index(factory, 32)
    index.train(vectors)
    index.add(vectors)
    whole = faiss.index_factory(32, factory + "np", faiss.METRIC_INNER_PRODUCT)
    whole.train(vectors)
    whole.add(vectors)
    assert np.array_equal(faiss.serialize_index(index), faiss.serialize_index(whole))


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_predicted_size_is_that_of_the_file(factory: str, tmp_path: Path) -> None:
    vectors = clustered_vectors(3_000, 32, seed=0)
    predicted = plan_index(*vectors.shape, factory).index_bytes
    assert predicted == pytest.approx(written_bytes(factory, vectors, tmp_path / "index"), rel=0.02)


@pytest.mark.parametrize(
    ("factory", "published_gb", "source"),
    [
        ("Flat", 65.0, "file: GitHub GaurisankarJ/reason_over_search docs/INDEX_ARCHITECTURE.md"),
        ("Flat", 60 * GIB / 1e9, "file, in GiB: GitHub RUC-NLPIR/FlashRAG issue 84"),
        ("SQfp16", 30 * GIB / 1e9, "GPU memory, in GiB: GitHub langfengQ/verl-agent issue 248"),
        ("IVF4096,SQ8", 16.0, "file: GitHub GaurisankarJ/reason_over_search docs/INDEX_ARCHITECTURE.md"),
        ("HNSW32,Flat", 70.0, "memory: GitHub GaurisankarJ/reason_over_search docs/RETRIEVER_INDEXING.md"),
        ("HNSW128,SQ8", 38.0, "file: Hugging Face data set wiki_dpr, 'exact' configuration"),
        ("IVF4096_HNSW128,PQ128", 2.87, "file: Hugging Face data set wiki_dpr, 'compressed' configuration"),
    ],
)
def test_wikipedia_is_as_large_as_others_found_it(factory: str, published_gb: float, source: str) -> None:
    plan = plan_index(WIKIPEDIA, 768, factory)
    assert plan.index_bytes / 1e9 == pytest.approx(published_gb, rel=0.05), source


def test_dpr_s_graph_is_as_large_as_its_authors_arithmetic() -> None:
    # DPR adds a dimension to turn inner products into distances; FAISS's wiki counts 4 d + 8 M bytes.
    plan = plan_index(WIKIPEDIA, 769, "HNSW512,Flat")
    assert plan.index_bytes == pytest.approx(WIKIPEDIA * (4 * 769 + 8 * 512), rel=0.05)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Flatt", "index factory 'Flatt' does not fit 64 dimensions"),
        ("", "does not fit"),
        ("PQ7", "'PQ7' does not fit 64 dimensions"),
        ("IVF64,LSH", "There are Flat, SQ4"),
        ("NSG32", "the size of IndexNSGFlat is not known"),
        ("IVF64,PQ8x4fs", "the size of IndexIVFPQFastScan is not known"),
        ("IVF64,Flat,RFlat", "the size of IndexRefineFlat is not known"),
    ],
)
def test_a_factory_string_that_cannot_be_planned_is_refused(factory: str, words: str) -> None:
    with pytest.raises(RetrieverError, match=words):
        plan_index(10_000, 64, factory)


@pytest.mark.parametrize(
    ("factory", "least"), [("IVF4096,Flat", "4,096"), ("PQ8", "256"), ("PQ8x10", "1,024")]
)
def test_an_index_that_needs_more_passages_is_refused(factory: str, least: str) -> None:
    with pytest.raises(RetrieverError, match=f"needs at least {least} passages, the corpus has 200"):
        plan_index(200, 64, factory)


@pytest.mark.parametrize(("count", "dimension", "memory"), [(0, 64, None), (1, 0, None), (1, 64, 0)])
def test_numbers_below_one_are_refused(count: int, dimension: int, memory: int | None) -> None:
    with pytest.raises(RetrieverError, match="must be at least 1"):
        plan_index(count, dimension, "Flat", memory_bytes=memory)


@given(
    count=st.integers(300, 50_000_000),
    factory=st.sampled_from(["Flat", "SQ8", "PQ16", "IVF256,SQ8", "HNSW32,Flat", "OPQ16_64,IVF256,PQ16"]),
    memory=st.integers(1, 200 * GIB),
)
@settings(max_examples=200, deadline=None)
def test_a_bounded_plan_stays_within_its_bound_or_says_what_would(
    count: int, factory: str, memory: int
) -> None:
    plan = plan_index(count, 128, factory, memory_bytes=memory)
    assert sum(plan.segments) == count
    assert max(plan.segments) - min(plan.segments) <= 1
    assert 1 <= len(plan.segments) <= MOST_SEGMENTS
    assert plan.training_rows <= count
    assert (plan.build_memory_bytes <= memory) == (plan.least_memory_bytes <= memory)
    if plan.build_memory_bytes > memory:
        with_least = plan_index(count, 128, factory, memory_bytes=plan.least_memory_bytes)
        assert with_least.build_memory_bytes <= plan.least_memory_bytes


@given(memory=st.integers(GIB // 2, 100 * GIB))
@settings(deadline=None)
def test_more_memory_never_means_more_segments(memory: int) -> None:
    plans = [plan_index(WIKIPEDIA, 768, "SQ8", memory_bytes=bound) for bound in (memory, memory + GIB)]
    assert len(plans[0].segments) >= len(plans[1].segments)


def test_a_small_bound_takes_a_smaller_sample_but_never_too_small_a_one() -> None:
    rows = [
        plan_index(1_000_000, 384, "IVF4096,SQ8", memory_bytes=memory).training_rows
        for memory in (4 * GIB, 1_200 << 20, 1)
    ]
    assert rows[0] == 64 * 4_096
    assert rows[0] > rows[1] > rows[2] == 39 * 4_096
    assert plan_index(1_000_000, 384, "Flat", memory_bytes=1).training_rows == 0


def test_disk_holds_the_vectors_the_index_and_the_passages_of_both() -> None:
    plan = plan_index(10_000, 64, "SQ8", passage_bytes=100, store_dtype="float16")
    assert plan.vectors_bytes == 10_000 * 64 * 2
    assert plan.passages_bytes == 1_000_000
    assert plan.disk_bytes == pytest.approx(plan.index_bytes + plan.vectors_bytes + 2_000_000, abs=1_000)
    encoded = plan_index(10_000, 64, "SQ8", passage_bytes=100, store_dtype="float16", has_vectors=True)
    assert encoded.disk_bytes == pytest.approx(encoded.index_bytes + 1_000_000, abs=1_000)


def test_a_mapped_index_takes_next_to_nothing_of_each_process() -> None:
    flat, graph = (plan_index(10_000_000, 768, factory) for factory in ("Flat", "HNSW32,Flat"))
    assert flat.load_mapped_bytes == flat.index_bytes
    assert flat.load_private_bytes < 300 << 20
    assert graph.load_private_bytes - flat.load_private_bytes == 10_000_000 * 12  # levels and offsets


@pytest.mark.parametrize(
    ("factory", "bytes_per_vector"),
    [("Flat", 2 * 768), ("SQfp16", 2 * 768), ("IVF4096,SQ8", 768 + 8), ("IVF4096,Flat", 4 * 768 + 8)],
)
def test_gpus_hold_flat_vectors_in_half_and_others_as_they_are(factory: str, bytes_per_vector: int) -> None:
    vram = plan_index(WIKIPEDIA, 768, factory).vram_bytes
    assert vram is not None
    assert vram - WIKIPEDIA * bytes_per_vector == pytest.approx(1.5 * GIB, rel=0.02)


@pytest.mark.parametrize("factory", ["HNSW32,Flat", "SQ8", "PQ64", "IVF4096_HNSW32,SQ8"])
def test_what_faiss_cannot_search_on_a_gpu_has_no_gpu_memory(factory: str) -> None:
    assert plan_index(WIKIPEDIA, 768, factory).vram_bytes is None


def test_a_build_that_fits_is_let_through(tmp_path: Path) -> None:
    check_fits(plan_index(1_000, 64, "Flat"), tmp_path / "new" / "index")
    check_fits(plan_index(1_000, 64, "Flat", memory_bytes=GIB), tmp_path, GIB)


def test_too_little_memory_for_one_segment_names_the_bound_that_fits(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(1 << 40)
    with pytest.raises(RetrieverError) as refused:
        check_fits(plan_index(WIKIPEDIA, 768, "Flat"), tmp_path, 8 * GIB)
    message = str(refused.value)
    assert "needs 64.9 GB of memory, there are 8.6 GB" in message
    assert f"with a memory bound of {8 * GIB:,} bytes it is built in 8 segments" in message
    check_fits(plan_index(WIKIPEDIA, 768, "Flat", memory_bytes=8 * GIB), tmp_path, 8 * GIB)


def test_too_small_a_bound_names_the_smallest_and_the_nearest_factory(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(1 << 40)
    plan = plan_index(WIKIPEDIA, 768, "HNSW64,Flat", memory_bytes=GIB)
    with pytest.raises(RetrieverError) as refused:
        check_fits(plan, tmp_path, GIB)
    message = str(refused.value)
    assert f"the smallest bound that works is {plan.least_memory_bytes:,} bytes" in message
    (nearest,) = _quoted(message)
    check_fits(plan_index(WIKIPEDIA, 768, nearest, memory_bytes=GIB), tmp_path, GIB)


def test_a_word_index_takes_no_more_memory_than_planned(tmp_path: Path) -> None:
    """Words as long, and as frequent, as those of English."""
    count = 20_000
    words = np.minimum(np.random.default_rng(0).zipf(1.2, (count, 60)), 30_000)
    texts = [" ".join(f"word{number:x}" for number in row) for row in words]
    size = sum(map(len, texts)) / count
    planned = plan_index(count, 8, "Flat", passage_bytes=size, bm25=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak, disk = pool.submit(_build_words, texts, tmp_path / "words").result()
    assert 0.5 * planned.words_memory_bytes < peak < planned.words_memory_bytes
    assert disk < planned.words_bytes
    assert (
        planned.disk_bytes - planned.words_bytes
        == plan_index(count, 8, "Flat", passage_bytes=size).disk_bytes
    )


def _build_words(texts: list[str], directory: Path) -> tuple[int, int]:
    """(most memory of this process, but for the texts; bytes of the word index)."""
    held = sum(map(len, texts))
    build_bm25((Passage(str(row), "", text) for row, text in enumerate(texts)), directory)
    return _resident("VmHWM") - held, sum(path.stat().st_size for path in directory.iterdir())


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def test_a_bound_below_the_word_index_is_refused_as_it_cannot_be_divided(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(1 << 40)
    check_fits(plan_index(WIKIPEDIA, 768, "Flat", memory_bytes=8 * GIB), tmp_path, 8 * GIB)
    plan = plan_index(WIKIPEDIA, 768, "Flat", memory_bytes=8 * GIB, bm25=True)
    with pytest.raises(RetrieverError, match="the word index alone, which is built in one piece"):
        check_fits(plan, tmp_path, 8 * GIB)
    check_fits(plan_index(WIKIPEDIA, 768, "Flat", memory_bytes=64 * GIB, bm25=True), tmp_path, 64 * GIB)


def test_too_small_a_disk_names_the_nearest_factory_that_fits(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(100 * 10**9)
    plan = plan_index(WIKIPEDIA, 768, "IVF4096,Flat", memory_bytes=8 * GIB, has_vectors=True)
    check_fits(plan, tmp_path, 8 * GIB)
    disk(60 * 10**9)
    with pytest.raises(RetrieverError, match=r"needs 79\.6 GB of disk space, there are 60\.0 GB") as refused:
        check_fits(plan, tmp_path, 8 * GIB)
    assert _quoted(str(refused.value)) == ["IVF4096,SQfp16"]


def test_too_small_a_disk_for_any_factory_suggests_half_precision(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(80 * 10**9)
    with pytest.raises(RetrieverError, match="and vectors stored in float16 would fit"):
        check_fits(plan_index(WIKIPEDIA, 768, "Flat", memory_bytes=8 * GIB), tmp_path, 8 * GIB)


def test_an_index_that_no_gpu_memory_holds_is_refused_before_it_is_loaded() -> None:
    flat = plan_index(WIKIPEDIA, 768, "Flat")
    check_loads(flat, [40 * GIB])
    check_loads(flat, [24 * GIB, 24 * GIB])
    with pytest.raises(
        RetrieverError, match=r"needs 33\.9 GB of memory on each, there are 25\.8 GB"
    ) as refused:
        check_loads(flat, [24 * GIB])
    assert "search it on the CPU" in str(refused.value)
    with pytest.raises(RetrieverError, match="FAISS cannot search a 'HNSW32' index on a GPU"):
        check_loads(plan_index(WIKIPEDIA, 768, "HNSW32"), [80 * GIB])


def test_times_grow_with_what_is_built() -> None:
    rates = Calibration(
        encode_s=2.0,
        cluster_s=0.5,
        learn_once_s=10.0,
        learn_s=0.25,
        add_s=1.0,
        add_rows=1_024,
        add_doubling_s=0.0,
        file_s=0.125,
        recall_s=3.0,
        recall_adds=2.0,
    )
    seconds = rates.seconds(encoded=100, segments=[50, 50], training_rows=80, file_bytes=800)
    assert dataclasses.astuple(seconds) == (200.0, 10.0 + 20.0 + 40.0, 100.0, 100.0, 300.0 + 4.0)
    assert seconds.total == 774.0
    graph = dataclasses.replace(rates, add_doubling_s=1.0)
    # log2(n) - log2(e) doublings beyond the measured size, on average over the filling.
    assert graph.seconds(0, [1_024 * 16], 0, 0).add == pytest.approx(16_384 * (1.0 + 4.0 - np.log2(np.e)))


@pytest.mark.parametrize("factory", ["Flat", "HNSW16,SQ8", "OPQ8_16,IVF64,PQ8"])
def test_a_calibration_times_everything_that_a_factory_does(factory: str, tmp_path: Path) -> None:
    rates = calibrate(factory, 64, tmp_path)
    plan = plan_index(100_000, 64, factory, has_vectors=True, calibration=rates)
    assert plan.seconds is not None
    assert plan.seconds.encode is None
    assert (plan.seconds.train > 0.0) == (plan.training_rows > 0)
    assert plan.seconds.add > 0.0 and plan.seconds.files > 0.0
    assert not list(tmp_path.iterdir())


def test_encoding_is_timed_per_passage(tmp_path: Path) -> None:
    from retriever_service.passages.corpus import Passage

    encoder = HashEncoder(EncoderSpec("hash"))
    passages = [Passage(str(i), "", f"passage number {i}") for i in range(64)]
    rates = calibrate("Flat", DIMENSION, tmp_path, encoder=encoder, passages=passages)
    assert rates.encode_s is not None and rates.encode_s > 0.0
    assert plan_index(1_000, DIMENSION, "Flat", calibration=rates).seconds.encode == 1_000 * rates.encode_s  # type: ignore[union-attr]


def test_free_memory_is_the_machine_s_or_the_container_s_whichever_is_less(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    free = lambda: available_memory(tmp_path / "meminfo", tmp_path)  # noqa: E731
    assert free() == 3_000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{1500 * 1024}\n")
    # Files that were read once, and more than once.
    cached = f"inactive_file {300 * 1024}\nactive_file {200 * 1024}\n"
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cached}")
    assert free() == 3_000 * 1024
    (tmp_path / "memory.max").write_text(f"{2000 * 1024}\n")
    assert free() == 1_000 * 1024


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much of the disk is free."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))

    return set_free


def _quoted(message: str) -> list[str]:
    """The factory strings that a refusal suggests."""
    return [part.split("'")[-2] for part in message.split(" would fit")[:-1]]
