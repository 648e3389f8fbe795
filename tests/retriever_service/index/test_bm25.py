"""BM25 against its formula, the order of equal scores, what must not come, and the files it is opened from."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.index import bm25 as bm25_module
from retriever_service.index.bm25 import K1, B, Bm25, build_bm25
from retriever_service.passages.corpus import Passage, read_corpus
from retriever_service.passages.evaluation import evaluate_run, read_qrels, read_queries
from retriever_service.passages.ranked import NO_ROW, Ranked
from tests.retriever_service.support import real_data

WORDS = ["lion", "tiger", "otter", "eagle"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=5), min_size=1, max_size=12)
QUERY = st.lists(st.sampled_from([*WORDS, "unicorn"]), max_size=4)


def passages(texts: Sequence[str]) -> Iterator[Passage]:
    return (Passage(str(row), "", text) for row, text in enumerate(texts))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


class Build:
    """Word indexes of lists of texts, each in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def __call__(self, *texts: str) -> Bm25:
        self._count += 1
        directory = self._directory / f"bm25-{self._count}"
        build_bm25(passages(texts), directory)
        return Bm25.open(directory, num_threads=2)


def found(ranked: Ranked, query: int = 0) -> list[tuple[int, float]]:
    rows, scores = ranked.rows[query], ranked.scores[query]
    assert (np.isfinite(scores) == (rows != NO_ROW)).all()
    return [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row != NO_ROW]


def formula(texts: list[list[str]], query: list[str]) -> list[float]:
    """Robertson's formula with Lucene's idf, word by word."""
    average = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for word in query:
        holders = sum(word in text for text in texts)
        idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        for row, text in enumerate(texts):
            if times := Counter(text)[word]:
                scores[row] += idf * times / (times + K1 * (1 - B + B * len(text) / average))
    return scores


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(texts=TEXTS, queries=st.lists(QUERY, min_size=1, max_size=5), data=st.data())
def test_search_is_the_formula_and_the_same_for_every_depth_and_company(
    build: Build, texts: list[list[str]], queries: list[list[str]], data: st.DataObject
) -> None:
    index = build(*map(" ".join, texts))
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    mask = None if allowed is None else np.array(allowed)
    asked = [" ".join(query) for query in queries]
    deep = index.search(asked, len(texts) + 3, mask)
    for number, query in enumerate(queries):
        expected = formula(texts, query)
        hits = found(deep, number)
        may_come = [row for row, score in enumerate(expected) if score > 0 and (mask is None or mask[row])]
        assert sorted(row for row, _ in hits) == may_come
        assert [score for _, score in hits] == pytest.approx([expected[row] for row, _ in hits])
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        for depth in (1, 2, 5):
            assert found(index.search(asked, depth, mask), number) == hits[:depth]
        assert found(index.search([" ".join(reversed(query))], len(texts), mask)) == hits


def test_of_many_equal_scores_the_first_rows_come(build: Build) -> None:
    index = build(*["the lion"] * 50, "a lion and a lion", *["lions"] * 50)
    assert [row for row, _ in found(index.search(["lion"], 4, None))] == [50, 0, 1, 2]
    allowed = np.arange(101) >= 60
    assert [row for row, _ in found(index.search(["lion"], 4, allowed))] == [60, 61, 62, 63]


def test_scores_and_rows_are_equally_many_whatever_is_asked_for(build: Build) -> None:
    """Defect 3 of reference servers: BM25 gives more scores than hits."""
    index = build("lion", "tiger")
    for depth in (1, 2, 50):
        ranked = index.search(["lion", "unicorn", ""], depth, None)
        assert ranked.rows.shape == ranked.scores.shape == (3, depth)
        assert [len(found(ranked, query)) for query in range(3)] == [1, 0, 0]


def test_queries_of_a_batch_are_spread_over_the_threads(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 3 of reference servers: the queries of a batch one after the other."""
    index, both_are_there = build("lion", "tiger"), threading.Barrier(2)
    retrieve = index._retrieve

    def together(*arguments: Any) -> Ranked:
        both_are_there.wait(timeout=30)
        return retrieve(*arguments)

    monkeypatch.setattr(index, "_retrieve", together)
    ranked = index.search(["tiger", "lion"], 1, None)
    assert ranked.rows.tolist() == [[1], [0]]


def test_warmed_up_index_compiles_no_more(tmp_path: Path) -> None:
    """In a process of its own: functions that were compiled before would hide what is not ready."""
    build_bm25(passages(["lion tiger", "lion", "lion"]), tmp_path / "b")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        warming, searching = pool.submit(_compilations, tmp_path / "b").result()
    assert warming > 0
    assert searching == 0


def _compilations(directory: Path) -> tuple[int, int]:
    """How often something is compiled while the index is ready, and by all kinds of searches afterwards."""
    from numba.core.event import install_recorder

    index = Bm25.open(directory, num_threads=2)
    with install_recorder("numba:compile") as warming:
        index.first_search()
    with install_recorder("numba:compile") as searching:
        for allowed in (None, np.array([True, False, True])):
            index.search(["tiger", "lion"], 1, allowed)
            index.search(["unicorn"], 5, allowed)
    return len(warming.buffer), len(searching.buffer)


def test_no_queries_give_no_lines(build: Build) -> None:
    assert build("lion").search([], 3, None).rows.shape == (0, 3)


def test_words_are_found_in_other_cases_forms_and_unicode_compositions_and_in_titles(tmp_path: Path) -> None:
    build_bm25([Passage("1", "Caf\u00e9", "Lions sleeping"), Passage("2", "", "an otter")], tmp_path / "b")
    index = Bm25.open(tmp_path / "b")
    for query in ("LION", "sleeps", "cafe\u0301"):
        assert [row for row, _ in found(index.search([query], 2, None))] == [0]


def test_stop_words_find_nothing(build: Build) -> None:
    assert found(build("the lion", "the otter").search(["the"], 2, None)) == []


def test_corpus_without_a_single_word_is_searched_without_finding(build: Build) -> None:
    assert found(build("the", "...").search(["lion", "..."], 2, None)) == []


def test_same_passages_give_the_same_files(tmp_path: Path) -> None:
    texts = ["the lion and the tiger", "otters", "an eagle"]
    for name in "ab":
        build_bm25(passages(texts), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_build_that_fails_leaves_nothing_and_can_be_done_again(tmp_path: Path) -> None:
    def broken() -> Iterator[Passage]:
        yield Passage("1", "", "lion")
        raise RuntimeError("no more passages")

    with pytest.raises(RuntimeError, match="no more passages"):
        build_bm25(broken(), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".b.partial").mkdir()  # as after kill -9
    (tmp_path / ".b.partial" / "old").touch()
    build_bm25(passages(["lion"]), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "old").exists()


def test_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="exists"):
        build_bm25(passages(["lion"]), tmp_path)


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="no passages"):
        build_bm25([], tmp_path / "b")


def test_build_that_the_disk_has_no_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bm25_module, "_BYTES_PER_POSTING", 2**60)
    with pytest.raises(RetrieverError, match="bytes of disk"):
        build_bm25(passages(["lion"]), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["bm25.json", "terms.arrow", "data.csc.index.npy", "indptr.csc.index.npy"])
def test_missing_or_cut_file_is_refused(tmp_path: Path, file: str) -> None:
    build_bm25(passages(["lion tiger", "otter"]), tmp_path / "b")
    path = tmp_path / "b" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RetrieverError, match=r"damaged one .*build the index again"):
        Bm25.open(tmp_path / "b")
    path.unlink()
    with pytest.raises(RetrieverError, match=r"damaged one .*build the index again"):
        Bm25.open(tmp_path / "b")


def test_files_of_two_indexes_are_refused(tmp_path: Path) -> None:
    build_bm25(passages(["lion tiger", "otter"]), tmp_path / "b")
    build_bm25(passages(["lion"]), tmp_path / "other")
    (tmp_path / "other" / "terms.arrow").replace(tmp_path / "b" / "terms.arrow")
    with pytest.raises(RetrieverError, match="do not belong together"):
        Bm25.open(tmp_path / "b")


def test_index_of_another_analysis_is_refused(tmp_path: Path) -> None:
    build_bm25(passages(["lion"]), tmp_path / "b")
    about = tmp_path / "b" / "bm25.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"stemmer": "german"}))
    with pytest.raises(RetrieverError, match=r"german.*build the index again"):
        Bm25.open(tmp_path / "b")


def test_scifact_is_ranked_as_well_as_published(tmp_path: Path) -> None:
    """nDCG@10 of Lucene's BM25 with these parameters is 0.679 (Anserini's regressions on BEIR)."""
    scifact = real_data("scifact")
    corpus = list(read_corpus([scifact / "corpus.jsonl"]))
    qrels = read_qrels(scifact / "qrels" / "test.tsv")
    queries = {id_: text for id_, text in read_queries(scifact / "queries.jsonl").items() if id_ in qrels}
    build_bm25(corpus, tmp_path / "b")
    ranked = Bm25.open(tmp_path / "b").search(list(queries.values()), 100, None)
    run = {
        id_: [(corpus[row].id, score) for row, score in found(ranked, number)]
        for number, id_ in enumerate(queries)
    }
    assert evaluate_run(qrels, run, ["ndcg"], [10])["ndcg@10"] == pytest.approx(0.677, abs=0.005)
