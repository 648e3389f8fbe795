"""Building, reusing, refusing and searching indexes, with a hashing encoder in place of a model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service import files
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.store import read_manifest, verify_checksums
from retriever_service.passages.corpus import Corpus
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine
from tests.retriever_service.support import (
    DIMENSION,
    HashEncoder,
    load_hash_encoder,
    write_animals,
    write_jsonl,
)

build_index = partial(build_index, workers=1)
build = partial(build_index, load_encoder=load_hash_encoder)
open_searcher = partial(SearchEngine.open, load_encoder=load_hash_encoder)
SPEC = EncoderSpec("hash")
WORDS = ["lion", "tiger", "otter", "eagle", "twins", "savanna", "jungle", "rivers", "cliffs", "lives", "the"]


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("animals")
    build([write_animals(directory / "corpus.jsonl")], directory / "index", SPEC)
    return directory / "index"


@pytest.fixture
def searcher(animals: Path) -> SearchEngine:
    return open_searcher(animals)


def found(hits: list[list[Any]]) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, hit.score) for hit in row] for row in hits]


def test_search_finds_the_passage_and_gives_it_back_whole(searcher: SearchEngine) -> None:
    ((best, *_),) = searcher.search(["where the otter swims"], 3)
    assert (best.passage.id, best.passage.title) == ("a2", "Otter")
    assert best.passage.text == "the otter swims in rivers"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_flat_search_is_brute_force(animals: Path, device: str) -> None:
    # Without FAISS's GPU build the device concerns the encoder alone.
    searcher, encoder = open_searcher(animals, device=device), HashEncoder(SPEC)
    queries = ["lion savanna", "the same twins", "cliffs"]
    passages = np.concatenate(list(encoder.encode_passages(Corpus(animals / "segments/0000/passages.arrow"))))
    scores = encoder.encode_queries(queries) @ passages.T
    for row, hits in zip(scores, searcher.search(queries, 6), strict=True):
        rows = [int(hit.passage.id[1:]) for hit in hits]
        assert rows == sorted(range(6), key=lambda i: (-np.round(row[i], 5), i))
        np.testing.assert_allclose([hit.score for hit in hits], row[rows], rtol=1e-5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    queries=st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), min_size=1, max_size=30),
    k=st.integers(1, 8),
)
def test_queries_together_are_queries_one_by_one(animals: Path, queries: list[str], k: int) -> None:
    together = open_searcher(animals).search(queries, k)
    alone = [open_searcher(animals).search([query], k)[0] for query in queries]
    assert together == alone


@given(k=st.integers(1, 5))
def test_fewer_hits_are_a_prefix_of_more(animals: Path, k: int) -> None:
    searcher = open_searcher(animals)
    assert searcher.search(["twins look"], k)[0] == searcher.search(["twins look"], 6)[0][:k]


def test_equal_scores_come_in_row_order(searcher: SearchEngine) -> None:
    ((first, second, *_),) = searcher.search(["twins look the same"], 4)
    assert (first.passage.id, second.passage.id) == ("a4", "a5")
    assert first.score == second.score


def test_k_beyond_the_corpus_gives_every_passage_once(searcher: SearchEngine) -> None:
    for k in (100, 10**9):
        (hits,) = searcher.search(["lion"], k)
        assert sorted(hit.passage.id for hit in hits) == [f"a{i}" for i in range(6)]


def test_index_that_finds_too_few_never_gives_a_wrong_passage(tmp_path: Path) -> None:
    """Defect 2 of reference servers: FAISS's -1 becomes the last passage."""
    rows = [{"id": f"p{i}", "text": f"word{i} word{i % 7}"} for i in range(64)]
    build([write_jsonl(tmp_path / "c.jsonl", rows)], tmp_path / "index", SPEC, factory="IVF16,Flat")
    narrow = open_searcher(tmp_path / "index").search(["word1", "word2"], 64)
    wide = open_searcher(tmp_path / "index", search_parameters="nprobe=16").search(["word1", "word2"], 64)
    assert all(0 < len(few) < len(all_) == 64 for few, all_ in zip(narrow, wide, strict=True))
    assert all({hit.passage.id for hit in few} <= {f"p{i}" for i in range(64)} for few in narrow)


def test_unknown_search_parameters_are_refused(animals: Path) -> None:
    with pytest.raises(RetrieverError, match=r"'nonsense=3' do not fit this index"):
        open_searcher(animals, search_parameters="nonsense=3")


@pytest.mark.parametrize("method", ["dense", "bm25", "hybrid"])
def test_query_of_white_space_finds_nothing_and_costs_nothing(tmp_path: Path, method: Any) -> None:
    build([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", SPEC, bm25=True)
    encoder = HashEncoder(SPEC)
    searcher = open_searcher(tmp_path / "index", load_encoder=lambda spec, device: encoder)
    options = SearchOptions(method)
    assert searcher.search(["", " \n\t"], 3, options) == [[], []]
    assert encoder.query_batches == []
    nothing, lion, nothing_either = searcher.search([" ", "lion", ""], 3, options)
    assert (nothing, nothing_either) == ([], [])
    assert [lion] == searcher.search(["lion"], 3, options)


def test_warming_up_uses_everything_and_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CountingReranker:
        fingerprint = "counting"
        pairs = 0

        def scores(self, pairs: Any) -> Any:
            self.pairs += len(pairs)
            return np.zeros(len(pairs), np.float32)

    reranker, warmed_up, stages = CountingReranker(), [], []
    monkeypatch.setattr("retriever_service.search.rerank.Reranker.open", lambda model, device: reranker)
    monkeypatch.setattr("retriever_service.index.bm25.Bm25.first_search", lambda self: warmed_up.append(self))
    build([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", SPEC, bm25=True)
    encoder = HashEncoder(SPEC)
    searcher = open_searcher(tmp_path / "index", reranker="any", load_encoder=lambda spec, device: encoder)
    searcher.on_stage = lambda stage, seconds: stages.append(stage)
    searcher.first_search()
    assert (len(encoder.query_batches), len(warmed_up), reranker.pairs) == (1, 1, 1)
    assert (stages, searcher.cache_hits) == ([], 0)
    searcher.search(encoder.query_batches[0], 1)
    assert (len(encoder.query_batches), searcher.cache_hits) == (2, 0)


def test_no_queries_give_no_results(searcher: SearchEngine) -> None:
    assert searcher.search([], 5) == []
    assert searcher.search_vectors(np.empty((0, DIMENSION), np.float32), 5) == []


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (["lion"], 0, "k must be"),
        (["lion"], True, "k must be"),
        (["lion"], "5", "k must be"),
        ("lion", 5, "a list of strings"),
        (["lion", None], 5, "query 1 must be a string"),
        (["\ud800"], 5, "query 0 is not valid Unicode"),
    ],
)
def test_bad_request_is_refused(searcher: SearchEngine, queries: Any, k: Any, message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        searcher.search(queries, k)


@pytest.mark.parametrize("vectors", [np.zeros((1, 3)), np.zeros(DIMENSION), np.full((1, DIMENSION), np.nan)])
def test_bad_vectors_are_refused(searcher: SearchEngine, vectors: Any) -> None:
    with pytest.raises(RetrieverError, match="vectors"):
        searcher.search_vectors(vectors, 1)


def test_repeated_queries_are_encoded_once_and_the_cache_is_bounded(animals: Path) -> None:
    encoder = HashEncoder(SPEC)
    searcher = open_searcher(animals, cached_queries=2, load_encoder=lambda spec, device: encoder)
    first = searcher.search(["lion", "tiger", "lion"], 2)
    assert found(searcher.search(["tiger", "lion"], 2)) == found([first[1], first[0]])
    searcher.search(["otter"], 2)
    searcher.search(["tiger"], 2)
    assert encoder.query_batches == [["lion", "tiger"], ["otter"], ["tiger"]]
    assert searcher.cache_hits == 3


def test_manifest_says_what_the_index_is(animals: Path) -> None:
    manifest = read_manifest(animals)
    assert (manifest.count, manifest.dimension, manifest.metric) == (6, DIMENSION, "inner_product")
    assert (manifest.factory, manifest.encoder.model) == ("Flat", "hash")
    assert sorted(manifest.files) == ["segments/0000/index.faiss", "segments/0000/passages.arrow"]


def test_same_build_again_reuses_the_index(tmp_path: Path) -> None:
    corpus = write_animals(tmp_path / "c.jsonl")
    progress: list[tuple[int, int]] = []
    built = build([corpus], tmp_path / "index", SPEC, on_progress=lambda *done: progress.append(done))
    assert progress[-1] == (6, 6)
    progress.clear()
    assert build([corpus], tmp_path / "index", SPEC, on_progress=lambda *done: progress.append(done)) == built
    assert progress == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index"]


@pytest.mark.parametrize("what", ["corpus", "encoder", "factory"])
def test_other_build_over_an_index_is_refused_and_leaves_it_alone(tmp_path: Path, what: str) -> None:
    corpus = write_animals(tmp_path / "c.jsonl")
    build([corpus], tmp_path / "index", SPEC)
    before = contents(tmp_path / "index")
    if what == "corpus":
        write_jsonl(corpus, [{"id": "new", "text": "other"}])
    spec = EncoderSpec("other") if what == "encoder" else SPEC
    with pytest.raises(RetrieverError, match="holds another index"):
        build([corpus], tmp_path / "index", spec, factory="HNSW8" if what == "factory" else "Flat")
    assert contents(tmp_path / "index") == before


def test_directory_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    corpus = write_animals(tmp_path / "c.jsonl")
    with pytest.raises(RetrieverError, match="exists and is not an index"):
        build([corpus], tmp_path, SPEC)


def test_build_that_failed_goes_on_by_the_same_command_and_refuses_others(tmp_path: Path) -> None:
    class Failing(HashEncoder):
        def encode_passages(self, passages: Any, on_rows: Any = None) -> Any:
            yield next(super().encode_passages(passages, on_rows))
            raise RuntimeError("the machine is on fire")

    corpus = write_animals(tmp_path / "c.jsonl")
    with pytest.raises(RuntimeError, match="on fire"):
        build_index([corpus], tmp_path / "index", SPEC, load_encoder=lambda spec, device: Failing(spec))
    assert not (tmp_path / "index").exists()
    with pytest.raises(RetrieverError, match="encoder"):
        build([corpus], tmp_path / "index", EncoderSpec("other"))
    build([corpus], tmp_path / "index", SPEC)
    build([corpus], tmp_path / "other", SPEC)
    assert contents(tmp_path / "index") == contents(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index", "other"]


def test_bad_corpus_is_refused_before_the_encoder_is_loaded(tmp_path: Path) -> None:
    def load(spec: EncoderSpec, device: str) -> HashEncoder:
        raise AssertionError("loaded")

    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(RetrieverError, match=r"c\.jsonl:1"):
        build_index([path], tmp_path / "index", SPEC, load_encoder=load)


@pytest.mark.parametrize(
    ("factory", "message"), [("Bogus", "does not fit"), ("IVF16,Flat", "needs at least 16 passages")]
)
def test_factory_that_does_not_fit_is_refused(tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        build([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", SPEC, factory=factory)


def test_full_disk_is_noticed_before_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RetrieverError, match="10 are free"):
        build([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", SPEC)


def test_other_encoder_is_refused_with_both_names(animals: Path) -> None:
    with pytest.raises(RetrieverError, match=r"'hash' .*'other' .*model 'hash' -> 'other'.*build another"):
        open_searcher(animals, encoder=EncoderSpec("other"))


def test_other_prefix_is_refused(animals: Path) -> None:
    with pytest.raises(RetrieverError, match="query_prefix '' -> 'query: '"):
        open_searcher(animals, encoder=EncoderSpec("hash", query_prefix="query: "))


def damaged_copy(animals: Path, target: Path) -> Path:
    shutil.copytree(animals, target)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["segments/0000/index.faiss", "segments/0000/passages.arrow"])
def test_cut_or_missing_file_is_named(animals: Path, tmp_path: Path, name: str) -> None:
    copy = damaged_copy(animals, tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RetrieverError, match=rf"{name} has \d+ bytes, expected {len(content)}"):
        open_searcher(copy)
    (copy / name).unlink()
    with pytest.raises(RetrieverError, match=f"{name} is missing"):
        open_searcher(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "index format 99"),
        ({"count": 7}, "manifest says 7"),
        ({"encoder": {"surprise": 1}}, "damaged manifest"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(
    animals: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = damaged_copy(animals, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(RetrieverError, match=message):
        open_searcher(copy)


def test_directory_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="not a built index"):
        open_searcher(tmp_path)


def test_checksums_find_a_changed_byte(animals: Path, tmp_path: Path) -> None:
    copy = damaged_copy(animals, tmp_path / "copy")
    verify_checksums(copy)
    content = bytearray((copy / "segments/0000/index.faiss").read_bytes())
    content[-1] ^= 1
    (copy / "segments/0000/index.faiss").write_bytes(content)
    with pytest.raises(RetrieverError, match=r"index\.faiss was changed"):
        verify_checksums(copy)
