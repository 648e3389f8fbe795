"""The three dialects, field by field."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions
from retriever_service.service.batching import Answers
from retriever_service.service.wire import (
    RetrieveRequest,
    SearchRequest,
    exsearch_reply,
    retrieve_reply,
    search_reply,
)

LION = Hit(Passage("a0", "Lion", "roars\nloudly", {"legs": 4}), 2.5)
UNTITLED = Hit(Passage("a1", "", "no title"), 0.5)
TWO_LINES = Hit(Passage("a2", "Two\nlines", "text"), 0.25)
ANSWERS = Answers(((LION, UNTITLED), (), (TWO_LINES,)), "f1")


def test_native_reply() -> None:
    lion = {
        "id": "a0",
        "title": "Lion",
        "text": "roars\nloudly",
        "metadata": {"legs": 4},
        "score": 2.5,
        "rank": 1,
    }
    untitled = {"id": "a1", "title": "", "text": "no title", "metadata": {}, "score": 0.5, "rank": 2}
    reply = search_reply(ANSWERS)
    assert reply["index"] == "f1"
    assert reply["results"][0] == {"hits": [lion, untitled], "returned": 2}
    assert reply["results"][1] == {"hits": [], "returned": 0}


def test_search_r1_reply_with_scores() -> None:
    assert retrieve_reply(ANSWERS, return_scores=True) == {
        "result": [
            [
                {"document": {"id": "a0", "contents": '"Lion"\nroars\nloudly'}, "score": 2.5},
                {"document": {"id": "a1", "contents": '""\nno title'}, "score": 0.5},
            ],
            [],
            [{"document": {"id": "a2", "contents": '"Two lines"\ntext'}, "score": 0.25}],
        ]
    }


def test_search_r1_reply_without_scores_is_bare_documents() -> None:
    assert retrieve_reply(ANSWERS, return_scores=False) == {
        "result": [
            [
                {"id": "a0", "contents": '"Lion"\nroars\nloudly'},
                {"id": "a1", "contents": '""\nno title'},
            ],
            [],
            [{"id": "a2", "contents": '"Two lines"\ntext'}],
        ]
    }


def test_exsearch_reply() -> None:
    reply = exsearch_reply("who roars", [LION, UNTITLED])
    total = 1 + math.exp(-2)
    assert reply == {
        "query": "who roars",
        "topk": [
            {"text": "Lion | roars\nloudly", "pid": "a0", "rank": 1, "score": 2.5, "prob": 1 / total},
            {"text": " | no title", "pid": "a1", "rank": 2, "score": 0.5, "prob": math.exp(-2) / total},
        ],
    }
    assert exsearch_reply("nothing", []) == {"query": "nothing", "topk": []}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_probabilities_add_up_whatever_the_scores(scores: list[float]) -> None:
    """Defect 8 of the original server: a softmax that overflows."""
    hits = [Hit(LION.passage, score) for score in sorted(scores, reverse=True)]
    probabilities = [hit["prob"] for hit in exsearch_reply("q", hits)["topk"]]
    assert math.isclose(sum(probabilities), 1.0)
    assert probabilities == sorted(probabilities, reverse=True)


def test_native_request_becomes_options() -> None:
    request = SearchRequest.model_validate_json(
        """{"queries": ["a", "b"], "k": 3, "method": "hybrid", "rerank": 20, "exclude": ["x", "y", "x"],
            "distinct": true, "filter": {"year": {"gte": 1990}, "lang": ["en", null], "kind": "city"}}"""
    )
    assert (request.all_queries, request.k) == (["a", "b"], 3)
    assert request.options == SearchOptions(
        method="hybrid",
        rerank=20,
        where=Filter.parse({"year": {"gte": 1990}, "lang": ["en", None], "kind": "city"}),
        exclude=frozenset({"x", "y"}),
        distinct=True,
    )


def test_native_request_needs_a_query_only() -> None:
    request = SearchRequest.model_validate_json('{"query": ""}')
    assert (request.all_queries, request.k, request.options) == ([""], 10, DEFAULT_OPTIONS)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{}", "give either queries"),
        ('{"query": "a", "queries": ["a"]}', "give either queries"),
        ('{"queries": []}', "at least 1 item"),
        ('{"queries": "a"}', "valid array"),
        ('{"queries": ["a", 1]}', "valid string"),
        ('{"query": null}', "valid string"),
        ('{"query": "a", "k": 0}', "greater than or equal to 1"),
        ('{"query": "a", "k": "3"}', "valid integer"),
        ('{"query": "a", "k": true}', "valid integer"),
        ('{"query": "a", "method": "magic"}', "'dense', 'bm25' or 'hybrid'"),
        ('{"query": "a", "deadline_s": 0.5}', "greater than or equal to 1"),
        ('{"query": "a", "deadline_s": NaN}', "finite number"),
        ('{"query": "a", "top_k": 3}', "Extra inputs are not permitted"),
        ('{"query": "a", "filter": [1]}', "an object"),
        ('{"query": "\\ud800"}', "hex escape"),
        ("[1]", "an object"),
        ("{", "EOF"),
    ],
)
def test_native_request_that_makes_no_sense(body: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SearchRequest.model_validate_json(body)


@pytest.mark.parametrize("condition", ['{"above": 3}', '{"gt": {}}', '{"gt": NaN}', "{}", "[[1]]"])
def test_filter_that_makes_no_sense_is_named(condition: str) -> None:
    request = SearchRequest.model_validate_json(f'{{"query": "a", "filter": {{"year": {condition}}}}}')
    with pytest.raises(RetrieverError, match="'year'"):
        _ = request.options


def test_retrieve_request_ignores_what_search_r1_does_not_know() -> None:
    request = RetrieveRequest.model_validate_json('{"queries": ["a"], "topk": null, "model": "e5"}')
    assert (request.all_queries, request.topk, request.return_scores) == (["a"], None, False)


def test_retrieve_request_of_skyrl_has_one_query() -> None:
    request = RetrieveRequest.model_validate_json('{"query": "a", "topk": 5, "return_scores": true}')
    assert (request.all_queries, request.topk, request.return_scores) == (["a"], 5, True)
