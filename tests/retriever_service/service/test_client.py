"""The HTTP client against a server that follows a script."""

from __future__ import annotations

import asyncio
import email.utils
import json
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import Hit, SearchOptions
from retriever_service.service.client import RetrieverHttpClient
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.scripted_server import ScriptedServer

Search = Callable[..., list[list[Hit]]]


def blocking(client: RetrieverHttpClient, *request: Any) -> list[list[Hit]]:
    return client.search(*request)


def in_a_loop(client: RetrieverHttpClient, *request: Any) -> list[list[Hit]]:
    async def scenario() -> list[list[Hit]]:
        try:
            return await client.asearch(*request)
        finally:
            await client.aclose()

    return asyncio.run(scenario())


both_ways = pytest.mark.parametrize("search", [blocking, in_a_loop])


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


def client(server: ScriptedServer, dialect: Any = "native", **options: Any) -> RetrieverHttpClient:
    return RetrieverHttpClient(server.url, dialect, **{"backoff_s": 0.001, "seed": 0} | options)


@both_ways
def test_native_hits_are_those_of_the_engine(server: ScriptedServer, search: Search) -> None:
    queries = ["the lion", "twins"]
    assert search(client(server), queries, 4) == FakeEngine().search(queries, 4)


@both_ways
def test_search_r1_hits_are_those_of_the_engine(server: ScriptedServer, search: Search) -> None:
    found = search(client(server, "search-r1"), ["the lion"], 2)
    # The contract carries no metadata.
    assert [
        [(hit.passage.id, hit.passage.title, hit.passage.text, hit.score) for hit in hits] for hits in found
    ] == [
        [(hit.passage.id, hit.passage.title, hit.passage.text, hit.score) for hit in hits]
        for hits in FakeEngine().search(["the lion"], 2)
    ]
    assert server.requests == [
        ("/retrieve", {"queries": ["the lion"], "topk": 2, "return_scores": True}, None)
    ]


@both_ways
@pytest.mark.parametrize("nameless", [{}, {"id": None}, {"id": ""}])
def test_search_r1_documents_without_ids_have_empty_ones(
    server: ScriptedServer, search: Search, nameless: dict[str, Any]
) -> None:
    item = {"document": {"contents": '"Lion"\nit roars', **nameless}, "score": 2}
    server.script = [(200, {}, json.dumps({"result": [[item]]}).encode())]
    assert search(client(server, "search-r1"), ["lion"], 1) == [[Hit(Passage("", "Lion", "it roars"), 2.0)]]


@both_ways
@pytest.mark.parametrize("query", ["a&k=1#b%20?c/d", 'a "b" | c', "caf\u00e9 \u4e16\n{}"])
def test_query_arrives_as_it_is(server: ScriptedServer, search: Search, query: str) -> None:
    """Defect 8 of the original client: the query is pasted into the address."""
    search(client(server, "search-r1"), [query], 1)
    ((_, body, _),) = server.requests
    assert body["queries"] == [query]


@both_ways
@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ("no line break, no bar", "", "no line break, no bar"),
        ('"Lion"\nthe lion | the cat', "Lion", "the lion | the cat"),
        ("Lion\nof two\nlines", "Lion", "of two\nlines"),
    ],
)
def test_passage_of_any_form_is_understood(
    server: ScriptedServer, search: Search, contents: str, title: str, text: str
) -> None:
    """Defect 8 of the original client: a passage without a bar between title and text is an exception."""
    document = {"document": {"id": "1", "contents": contents}, "score": 0.5}
    server.script = [(200, {}, json.dumps({"result": [[document]]}).encode())]
    assert search(client(server, "search-r1"), ["q"], 1) == [[Hit(Passage("1", title, text), 0.5)]]


@both_ways
@pytest.mark.parametrize(
    ("document", "passage"),
    [
        ({"id": 17, "contents": '"Lion"\nit roars'}, Passage("17", "Lion", "it roars")),
        ({"_id": 0, "title": "Lion", "text": "it roars"}, Passage("0", "Lion", "it roars")),
        ({"id": "a", "title": "Lion", "text": ""}, Passage("a", "Lion", "")),
        ({"id": "a", "contents": '"Lion"\n '}, Passage("a", "Lion", " ")),
        ({"id": "a", "contents": "Lion\nit roars"}, Passage("a", "Lion", "it roars")),
        ({"title": "it roars", "text": "", "contents": "it roars"}, Passage("", "", "it roars")),
        ({"title": "Lion", "text": "", "contents": '"Lion"\nit roars'}, Passage("", "Lion", "it roars")),
        ({"title": "Lion", "text": "it roars", "contents": "other"}, Passage("", "Lion", "it roars")),
        ({"id": "a", "title": None, "text": "it roars"}, Passage("a", "", "it roars")),
        ({"id": "a", "title": "Lion", "text": None}, Passage("a", "Lion", "")),
        ({"id": "a", "title": "Lion"}, Passage("a", "Lion", "")),
        ({"id": "a", "title": 1984, "text": "it roars"}, Passage("a", "1984", "it roars")),
        ({"id": 17.0, "text": "it roars"}, Passage("17", "", "it roars")),
        ({"id": 1.5, "text": "it roars"}, Passage("1.5", "", "it roars")),
        ({"id": "a", "text": "it roars", "metadata": "none"}, Passage("a", "", "it roars")),
    ],
)
def test_odd_but_clear_documents_of_other_servers_are_taken_as_they_are(
    server: ScriptedServer, search: Search, document: dict[str, Any], passage: Passage
) -> None:
    reply = {"result": [[{"document": document, "score": 1}]]}
    server.script = [(200, {}, json.dumps(reply).encode())]
    assert search(client(server, "search-r1"), ["q"], 1) == [[Hit(passage, 1.0)]]


@both_ways
@pytest.mark.parametrize("score", [{}, {"score": None}, {"score": "high"}, {"score": float("nan")}])
def test_order_of_a_server_is_kept_where_it_gives_no_scores(
    server: ScriptedServer, search: Search, score: dict[str, Any]
) -> None:
    items = [{"document": {"id": id_, "text": "it roars"}} | score for id_ in "ba"]
    server.script = [(200, {}, json.dumps({"result": [items]}).encode())]
    expected = [Hit(Passage(id_, "", "it roars"), 0.0) for id_ in "ba"]
    assert search(client(server, "search-r1"), ["q"], 2) == [expected]


@both_ways
def test_bare_documents_fewer_and_more_of_them_and_none_at_all_are_taken(
    server: ScriptedServer, search: Search
) -> None:
    bare = [{"id": id_, "contents": "it roars"} for id_ in "abc"]
    server.script = [(200, {}, json.dumps({"result": [bare, bare[:1], [], None]}).encode())]
    found = search(client(server, "search-r1"), ["p", "q", "r", "s"], 2)
    assert [[hit.passage.id for hit in hits] for hits in found] == [["a", "b"], ["a"], [], []]


@both_ways
@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"document": {"id": "a", "title": " ", "text": ""}, "score": 1.0}, "neither title nor text"),
        ({"document": {"id": True, "text": "x"}, "score": 1.0}, "'id' must be a string, is bool"),
        ({"document": {"id": ["a"], "text": "x"}, "score": 1.0}, "'id' must be a string, is list"),
        ({"document": {"id": "a", "text": None}, "score": 1.0}, "neither title nor text"),
        ({"document": {"id": "a"}, "score": 1.0}, "neither title nor text"),
        ({"document": {"id": "a", "text": {"en": "x"}}, "score": 1.0}, "'text' must be a string, is dict"),
        ({"document": {"id": "a", "text": "\ud800"}, "score": 1.0}, "does not answer as"),
        ({"document": None, "score": 1.0}, "does not answer as"),
        ("it roars", "does not answer as"),
    ],
)
def test_documents_that_make_no_sense_are_an_error(
    server: ScriptedServer, search: Search, item: Any, told: str
) -> None:
    server.script = [(200, {}, json.dumps({"result": [[item]]}).encode())]
    with pytest.raises(RetrieverError, match=told):
        search(client(server, "search-r1"), ["q"], 1)


@both_ways
@pytest.mark.parametrize(
    "hit",
    [
        {"id": 1, "title": "", "text": "x", "metadata": {}, "score": 1.0},
        {"id": "a", "title": None, "text": "x", "metadata": {}, "score": 1.0},
        {"id": "a", "title": "", "text": "x", "metadata": {}, "score": "high"},
    ],
)
def test_native_hits_of_other_types_are_an_error(
    server: ScriptedServer, search: Search, hit: dict[str, Any]
) -> None:
    server.script = [(200, {}, json.dumps({"results": [{"hits": [hit]}]}).encode())]
    with pytest.raises(RetrieverError, match="does not answer as a native server does"):
        search(client(server), ["q"], 1)


@both_ways
def test_options_and_token_are_sent(server: ScriptedServer, search: Search) -> None:
    options = SearchOptions(
        "hybrid", 20, Filter.parse({"year": {"gt": 3}, "kind": "city"}), frozenset({"b", "a"}), distinct=True
    )
    search(client(server, token="secret", timeout_s=7.0), ["q"], 3, options)
    ((path, body, token),) = server.requests
    assert (path, token) == ("/search", "Bearer secret")
    assert body == {
        "queries": ["q"],
        "k": 3,
        "method": "hybrid",
        "rerank": 20,
        "filter": {"year": {"gt": 3}, "kind": ["city"]},
        "exclude": ["a", "b"],
        "distinct": True,
        "deadline_s": 7.0,
    }


@both_ways
def test_options_that_search_r1_cannot_fulfil_are_refused(server: ScriptedServer, search: Search) -> None:
    with pytest.raises(RetrieverError, match="native"):
        search(client(server, "search-r1"), ["q"], 3, SearchOptions(method="bm25"))
    assert server.requests == []


@both_ways
@pytest.mark.parametrize("failure", [429, 503, 500, 504, 408])
def test_failure_that_passes_is_tried_again(server: ScriptedServer, search: Search, failure: int) -> None:
    """Defect 5 of reference clients: no second attempt."""
    server.script = [failure, failure]
    assert search(client(server), ["lion"], 1) == FakeEngine().search(["lion"], 1)
    assert len(server.requests) == 3


@both_ways
@pytest.mark.parametrize("failure", [400, 401, 404, 413, 422, 302])
def test_mistake_is_not_tried_again(server: ScriptedServer, search: Search, failure: int) -> None:
    """Defect 5 of reference clients: no look at the status."""
    server.script = [failure]
    with pytest.raises(RetrieverError, match=f"{failure}: as scripted"):
        search(client(server), ["lion"], 1)
    assert len(server.requests) == 1


@both_ways
def test_last_failure_is_typed_and_named(server: ScriptedServer, search: Search) -> None:
    """Defect 1 of reference clients: a search that failed becomes one that found nothing."""
    server.script = [503] * 9
    with pytest.raises(RetrieverUnavailable, match=r"3 attempts .*status 503: as scripted"):
        search(client(server, max_attempts=3), ["lion"], 1)
    assert len(server.requests) == 3


@both_ways
def test_hanging_server_is_given_up_at_the_deadline(server: ScriptedServer, search: Search) -> None:
    """Defect 5 of reference clients: no timeout (defect 8, too)."""
    server.script = ["hang"] * 2
    with pytest.raises(RetrieverUnavailable, match=r"2 attempts of 0.05 s; .*Timeout"):
        search(client(server, timeout_s=0.05, max_attempts=2), ["lion"], 1)


@both_ways
def test_reply_that_trickles_is_given_up_at_the_deadline(server: ScriptedServer, search: Search) -> None:
    server.script = ["trickle"]
    started = time.monotonic()
    with pytest.raises(RetrieverUnavailable, match=r"1 attempts of 0.2 s; .*Timeout"):
        search(client(server, timeout_s=0.2, max_attempts=1), ["lion"], 1)
    assert time.monotonic() - started < 5


@both_ways
def test_nobody_listening_is_unavailable(search: Search) -> None:
    lost = RetrieverHttpClient("http://127.0.0.1:1", max_attempts=2, backoff_s=0.001)
    with pytest.raises(RetrieverUnavailable, match="ConnectError"):
        search(lost, ["lion"], 1)


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("3", 3.0, 4.5),
        ("100", 10.0, 10.0),
        ("soon", 0.5, 1.5),
        (email.utils.formatdate(time.time() + 3600), 10.0, 10.0),
        (email.utils.formatdate(0), 0.5, 1.5),
    ],
    ids=["seconds", "too many seconds", "no date", "a later date", "a date that is past"],
)
def test_server_says_when_to_come_back(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, retry_after: str, least: float, most: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("retriever_service.service.client.time.sleep", pauses.append)
    server.script = [(429, {"Retry-After": retry_after}, b"{}")]
    client(server, backoff_s=1.0, timeout_s=10.0, seed=None).search(["lion"], 1)
    before_first, before_second = pauses
    assert before_first == 0
    assert least <= before_second <= most


def test_pauses_grow_and_are_not_alike(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("retriever_service.service.client.time.sleep", pauses.append)
    for seed in range(20):
        server.script = [503] * 3
        client(server, backoff_s=1.0, seed=seed).search(["lion"], 1)
    for attempt, mean in ((1, 1.0), (2, 2.0), (3, 4.0)):
        of_attempt = pauses[attempt::4]
        assert len(set(of_attempt)) == 20
        assert all(0.5 * mean <= pause <= 1.5 * mean for pause in of_attempt)


@both_ways
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>", "<html>"),
        (b"[]", "address"),
        (b'{"results": [{"hits": [{}]}]}', "address"),
        (b'{"results": []}', "0 of 1 queries"),
        (b'{"results": [{"hits": []}, {"hits": []}]}', "2 of 1 queries"),
    ],
)
def test_reply_that_does_not_fit_is_an_error(
    server: ScriptedServer, search: Search, content: bytes, told: str
) -> None:
    server.script = [(200, {}, content)]
    with pytest.raises(RetrieverError, match=told):
        search(client(server), ["lion"], 1)
    assert len(server.requests) == 1


@both_ways
def test_bad_request_is_not_even_sent(server: ScriptedServer, search: Search) -> None:
    for queries, k in ((["lion"], 0), ("lion", 1), (["\ud800"], 1)):
        with pytest.raises(RetrieverError):
            search(client(server), queries, k)
    assert search(client(server), [], 1) == []
    assert server.requests == []


def test_connections_are_used_again(server: ScriptedServer) -> None:
    searching = client(server)
    for _ in range(5):
        searching.search(["lion"], 1)

    async def scenario() -> None:
        for _ in range(5):
            await searching.asearch(["lion"], 1)
        await searching.aclose()

    asyncio.run(scenario())
    searching.close()
    assert len(server.connections) == 2


def test_client_works_in_one_event_loop_after_another_and_as_a_copy(server: ScriptedServer) -> None:
    searching = client(server)
    searching.search(["lion"], 1)
    for _ in range(2):
        assert asyncio.run(searching.asearch(["lion"], 1)) == FakeEngine().search(["lion"], 1)
    copy: RetrieverHttpClient = pickle.loads(pickle.dumps(searching))
    assert copy.search(["lion"], 1) == FakeEngine().search(["lion"], 1)


def test_fingerprint_is_that_of_the_index(server: ScriptedServer) -> None:
    assert client(server).fingerprint == FakeEngine().fingerprint
    assert server.url in client(server, "search-r1").fingerprint


@pytest.mark.parametrize(
    "bad",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "http://"},
        {"url": "http://x:port"},
        {"dialect": "flashrag"},
        {"max_attempts": 0},
        {"timeout_s": 0},
    ],
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(RetrieverError):
        RetrieverHttpClient(**{"url": "http://x"} | bad)
