"""What each stage of a retriever is asked, with and without an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.benchmarks.corpora import BenchmarkCorpus
from pipeline.core.benchmarks.queries import Query
from pipeline.core.benchmarks.searching import TaskSearcher, asked
from pipeline.core.benchmarks.spec import INSTRUCTION_FORMAT, SearchConfig
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine
from tests.pipeline.core.benchmarks.support import ANIMALS, CountingEncoders, KeywordReranker
from tests.retriever_service.support import load_hash_encoder, write_jsonl

INSTRUCTED = Query("q", "sea {river}", "Find a whale.", {"4": 1})
PLAIN = Query("q", "sea", "", {"4": 1})


def searcher_of(
    folder: Path, depth: int = 6, reranker: Any = None, **settings: Any
) -> tuple[Any, CountingEncoders]:
    path = write_jsonl(
        folder / "animals.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(ANIMALS)]
    )
    corpus = BenchmarkCorpus.of_files("animals", [path], folder / "out")
    load = CountingEncoders()
    return TaskSearcher(SearchConfig(**settings), corpus, depth=depth, load=load, reranker=reranker), load


def test_an_encoder_is_asked_in_two_lines_with_an_instruction(tmp_path: Path) -> None:
    searcher, load = searcher_of(tmp_path)
    searcher.rank([INSTRUCTED], "with")
    assert load.asked == ["Instruct: Find a whale.\nQuery: sea {river}"]


@pytest.mark.parametrize("query", [INSTRUCTED, PLAIN])
def test_without_an_instruction_nothing_is_put_in_front(tmp_path: Path, query: Query) -> None:
    """The released program of ToolRet passes an empty instruction, and so asks `Instruct: \\nQuery: sea`."""
    searcher, load = searcher_of(tmp_path)
    searcher.rank([query], "without")
    searcher.rank([PLAIN], "with")
    assert load.asked == [query.text, "sea"]


texts = st.text(min_size=1)


@given(texts, texts)
def test_the_arms_differ_exactly_where_there_is_an_instruction(text: str, instruction: str) -> None:
    query = Query("q", text, instruction, {})
    assert asked(query, "without", "{query}", INSTRUCTION_FORMAT) == text
    assert asked(query, "with", "{query}", INSTRUCTION_FORMAT) == f"Instruct: {instruction}\nQuery: {text}"
    assert asked(Query("q", text, "", {}), "with", "{query}", INSTRUCTION_FORMAT) == text


def test_bm25_is_asked_the_instruction_in_front_of_the_query(tmp_path: Path) -> None:
    searcher, _ = searcher_of(tmp_path, method="bm25")
    (without,), (with_,) = (searcher.rank([INSTRUCTED], arm) for arm in ("without", "with"))
    assert [id_ for id_, _ in without] == ["2", "4"] and {id_ for id_, _ in with_} == {"2", "4"}
    assert with_[0][0] == "4", "the instruction names the whale"


def test_formats_of_an_encoder_stand_in_place_of_the_usual_ones(tmp_path: Path) -> None:
    """E5: its prefix stands in front of the query, behind the instruction."""
    formats = {
        "query_format": "query: {query}",
        "instruction_format": "Instruct: {instruction}\nquery: {query}",
    }
    searcher, load = searcher_of(tmp_path, query_prefix="", **formats)
    for arm in ("without", "with"):
        searcher.rank([INSTRUCTED], arm)
    assert load.asked == ["query: sea {river}", "Instruct: Find a whale.\nquery: sea {river}"]


@pytest.mark.parametrize("method", ["dense", "bm25", "hybrid"])
def test_rankings_are_those_of_the_search_engine(tmp_path: Path, method: Any) -> None:
    searcher, _ = searcher_of(tmp_path, depth=4, method=method)
    spec = EncoderSpec("minilm")
    build_index(
        [tmp_path / "animals.jsonl"], tmp_path / "index", spec, bm25=True, load_encoder=load_hash_encoder
    )
    engine = SearchEngine.open(tmp_path / "index", load_encoder=load_hash_encoder)
    queries = ["lion sea", "camel of the river", "whale"]
    expected = engine.search(queries, 4, SearchOptions(method))
    found = searcher.rank([Query(text, text, "", {}) for text in queries], "without")
    assert found == [[(hit.passage.id, pytest.approx(hit.score)) for hit in hits] for hits in expected]


def test_a_reranker_orders_the_candidates_by_its_own_scores(tmp_path: Path) -> None:
    """The released program mixes up candidates, instruction and output, and returns what was not scored."""
    reranker = KeywordReranker("river")
    searcher, _ = searcher_of(tmp_path, method="bm25", rerank="model", candidates=2, reranker=reranker)
    query = Query("q", "sea river desert", "Find water.", {})
    (without,), (with_,) = (searcher.rank([query], arm) for arm in ("without", "with"))
    assert without == with_ and [score for _, score in without] == [1.0, 0.0] and without[0][0] == "2"
    texts = [text for text, _ in reranker.pairs]
    assert texts == ["sea river desert"] * 2 + ["Instruct: Find water.\nQuery: sea river desert"] * 2
    assert len({passage.id for _, passage in cast(Any, reranker.pairs)}) == 2


def test_many_queries_are_searched_in_parts_and_counted(tmp_path: Path) -> None:
    searcher, load = searcher_of(tmp_path)
    queries = [Query(str(n), text, "", {}) for n, text in enumerate(ANIMALS * 12)]
    told: list[int] = []
    found = searcher.rank(queries, "without", told.append)
    assert sum(told) == len(queries) == 72 and len(told) > 1
    assert load.asked == [query.text for query in queries]
    assert [ranking[0][0] for ranking in found] == [str(n % 6) for n in range(72)]


def test_a_query_that_finds_nothing_has_an_empty_ranking(tmp_path: Path) -> None:
    searcher, _ = searcher_of(tmp_path, method="bm25", rerank="model", reranker=KeywordReranker("x"))
    assert searcher.rank([Query("q", "zebra", "", {})], "without") == [[]]
