"""Building within a memory bound, through kills, and what an approximate index reports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.building import build
from retriever_service.building.build import build_from_vectors
from retriever_service.building.planner import plan_index
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.encoding.vectors import VectorStore
from retriever_service.errors import RetrieverError
from retriever_service.index.store import read_manifest, verify_checksums
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl

SPEC = EncoderSpec("hash")
COUNT = 600
QUERIES = [f"word{i} common{i % 9}" for i in range(0, 60, 7)]
open_engine = partial(SearchEngine.open, load_encoder=load_hash_encoder)


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "text": f"word{i} word{i // 2} common{i % 9}", "metadata": {"parity": i % 2, "n": i}}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VectorStore:
    directory = tmp_path_factory.mktemp("vectors")
    corpus = write_jsonl(directory / "c.jsonl", rows())
    return encode_corpus(
        [corpus], directory / "vectors", SPEC, workers=1, shard_rows=100, load_encoder=load_hash_encoder
    )


@pytest.fixture
def three_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the memory bound asked for it: real bounds of so small an index are below that of the process."""
    from dataclasses import replace

    monkeypatch.setattr(
        build,
        "plan_index",
        lambda *a, **k: replace(plan_index(*a, **k), segments=(250, 250, COUNT - 500)),
    )


def found(engine: SearchEngine, k: int = 20, **options: Any) -> list[list[tuple[str, float]]]:
    hits = engine.search(QUERIES, k, SearchOptions(**options))
    return [[(hit.passage.id, hit.score) for hit in row] for row in hits]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_segments_answer_like_one_index(store: VectorStore, tmp_path: Path, three_segments: None) -> None:
    manifest = build_from_vectors(store, tmp_path / "three")
    assert [segment.count for segment in manifest.segments] == [250, 250, 100]
    engine = open_engine(tmp_path / "three")
    scores = [engine._encoder.encode_queries([query]) @ store.read(0, COUNT).T for query in QUERIES]
    for row, hits in zip(scores, found(engine), strict=True):
        best = sorted(range(COUNT), key=lambda i: (-np.float32(round(float(row[0, i]), 5)), i))[:20]
        assert [id_ for id_, _ in hits] == [f"p{i}" for i in best]
    # Defect 7 of reference builders: vectors that went through half precision.
    indexed = np.concatenate([segment.reconstruct_n(0, segment.ntotal) for segment in engine._index.segments])
    assert np.array_equal(indexed, store.read(0, COUNT))
    verify_checksums(tmp_path / "three")


def test_places_without_a_passage_stay_empty_in_every_segment(
    store: VectorStore, tmp_path: Path, three_segments: None
) -> None:
    """Defect 2 of reference servers: FAISS's -1, behind the rows of other segments, becomes one of their passages."""
    build_from_vectors(store, tmp_path / "index", factory="IVF16,Flat")
    few = found(open_engine(tmp_path / "index", search_parameters="nprobe=1"), COUNT)
    all_ = found(open_engine(tmp_path / "index", search_parameters="nprobe=16"), COUNT)
    for some, everything in zip(few, all_, strict=True):
        assert 0 < len(some) < len(everything) == COUNT
        assert len(dict(some)) == len(some)
        scores = dict(everything)
        assert dict(some) == pytest.approx({id_: scores[id_] for id_, _ in some})


@pytest.mark.parametrize(
    "factory", ["SQfp16", "SQ8", "HNSW16", "IVF8,Flat", "IVF8,SQ8", "PQ8x4", "PCA16,SQ8"]
)
def test_filters_and_deletions_hold_for_every_kind_of_index(
    store: VectorStore, tmp_path: Path, factory: str
) -> None:
    build_from_vectors(store, tmp_path / "index", factory=factory)
    engine = open_engine(tmp_path / "index")
    from retriever_service.passages.filters import Filter

    everything = {id_ for row in found(engine, 600) for id_, _ in row}
    engine.delete(["p0", "p2"])
    even = Filter.parse({"parity": 0, "n": {"lt": 300}})
    for row in found(engine, 10, where=even):
        assert len(row) == 10
        assert all(int(id_[1:]) % 2 == 0 and int(id_[1:]) < 300 and id_ not in ("p0", "p2") for id_, _ in row)
    assert len(everything) > 300


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,Flat", "SQ8"])
def test_an_approximate_index_reports_its_recall_and_is_searched_as_tuned(
    store: VectorStore, tmp_path: Path, factory: str
) -> None:
    manifest = build_from_vectors(store, tmp_path / "index", factory=factory, target_recall=0.9)
    chosen = [p for p in manifest.recall if p.search_parameters == manifest.search_parameters]
    assert chosen[0].recall["10"] >= 0.9
    assert open_engine(tmp_path / "index").info()["search_parameters"] == manifest.search_parameters


def test_the_same_vectors_give_the_same_bytes(store: VectorStore, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_from_vectors(store, tmp_path / name, factory="IVF8,SQ8", bm25=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_bound_that_is_too_small_is_refused_before_anything_is_made(
    store: VectorStore, tmp_path: Path
) -> None:
    with pytest.raises(RetrieverError, match="smallest bound that works"):
        build_from_vectors(store, tmp_path / "index", memory_bytes=1 << 20)
    assert not (tmp_path / "index").exists()


def test_a_bound_below_the_word_index_is_refused_before_anything_is_made(
    store: VectorStore, tmp_path: Path
) -> None:
    build_from_vectors(store, tmp_path / "without", memory_bytes=230 << 20)
    with pytest.raises(RetrieverError, match="the word index alone, which is built in one piece"):
        build_from_vectors(store, tmp_path / "index", memory_bytes=230 << 20, bm25=True)
    assert not (tmp_path / "index").exists()


def test_an_unfinished_build_of_another_index_is_refused(
    store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_segment", stop)
        with pytest.raises(KeyboardInterrupt):
            build_from_vectors(store, tmp_path / "index", factory="SQ8")
    with pytest.raises(
        RetrieverError, match=r"unfinished build of another index \(factory 'SQ8' -> 'Flat'\)"
    ):
        build_from_vectors(store, tmp_path / "index", factory="Flat")
    build_from_vectors(store, tmp_path / "index", factory="SQ8")
    assert read_manifest(tmp_path / "index").factory == "SQ8"


CHILD = """
import sys
from pathlib import Path
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from tests.retriever_service.support import load_hash_encoder
if __name__ == "__main__":
    build_index([sys.argv[1]], Path(sys.argv[2]), EncoderSpec("hash"), factory="IVF8,SQ8", bm25=True, workers=1,
                load_encoder=load_hash_encoder)
"""


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", rows())
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    root = Path(__file__).resolve().parents[3]

    def start(out: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.Popen([sys.executable, str(script), str(corpus), str(out)], env=environment)

    partial_build = tmp_path / ".killed.partial"
    for sign in ("vectors/shards", "index/segments", "index/bm25-0"):
        process = start(tmp_path / "killed")
        while not (partial_build / sign).exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert start(tmp_path / "undisturbed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert not partial_build.exists()


def test_hnsw_and_tombstones_leave_no_gap(store: VectorStore, tmp_path: Path) -> None:
    build_from_vectors(store, tmp_path / "index", factory="HNSW16")
    engine = open_engine(tmp_path / "index")
    engine.delete([f"p{i}" for i in range(0, COUNT, 2)])
    assert all(len(row) == 10 for row in found(engine, 10))


def test_a_factory_that_is_none_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "1", "text": "lion"}, {"id": "2", "text": "tiger"}])
    encoder = HashEncoder(SPEC)
    encoder.encode_passages = None  # type: ignore[assignment,method-assign]  # nobody may call it
    with pytest.raises(RetrieverError, match="NONSENSE"):
        build.build_index(
            [corpus],
            tmp_path / "index",
            SPEC,
            factory="NONSENSE",
            workers=1,
            load_encoder=lambda spec, device: encoder,
        )
    assert not (tmp_path / "index").exists()
