"""The HTTP service: its routes, what it refuses, and how it starts and ends. The index is a stand-in."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from retriever_service.errors import RetrieverError
from retriever_service.service.limits import Limits
from retriever_service.service.server import ServerSettings
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.live_server import ask, hold, metric, running, with_server


def test_native_search_gives_what_the_library_gives() -> None:
    reply = ask("POST", "/search", json={"queries": ["the otter swims", "lion"], "k": 2})
    assert reply.status_code == 200
    engine = FakeEngine()
    expected = engine.search(["the otter swims", "lion"], 2)
    body = reply.json()
    assert body["index"] == engine.fingerprint
    assert [[(hit["id"], hit["score"]) for hit in result["hits"]] for result in body["results"]] == [
        [(hit.passage.id, hit.score) for hit in hits] for hits in expected
    ]


def test_native_search_with_options() -> None:
    body = {"query": "the", "k": 5, "filter": {"legs": 4}, "exclude": ["a0"], "distinct": True}
    hits = ask("POST", "/search", json=body).json()["results"][0]["hits"]
    assert {hit["id"] for hit in hits} == {"a1", "a2"}
    assert hits[0]["metadata"]["legs"] == 4


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("return_scores", [True, False, None])
def test_search_r1_dialects(num_queries: int, return_scores: bool | None) -> None:
    """Defect 1 of reference servers: without scores, HTTP 500, or nonsense for just two queries."""
    queries = ["the lion", "the otter", "twins"][:num_queries]
    request: dict[str, Any] = {"queries": queries, "topk": 2}
    if return_scores is not None:
        request["return_scores"] = return_scores
    reply = ask("POST", "/retrieve", json=request)
    assert reply.status_code == 200
    expected = [
        [
            ({"id": hit.passage.id, "contents": f'"{hit.passage.title}"\n{hit.passage.text}'}, hit.score)
            for hit in hits
        ]
        for hits in FakeEngine().search(queries, 2)
    ]
    if return_scores:
        items: Any = [[{"document": doc, "score": score} for doc, score in row] for row in expected]
    else:
        items = [[document for document, _ in row] for row in expected]
    assert reply.json() == {"result": json.loads(json.dumps(items).replace("Two\\nlines", "Two lines"))}


def test_search_r1_default_topk() -> None:
    assert len(ask("POST", "/retrieve", json={"queries": ["lion"]}).json()["result"][0]) == 3


def test_skyrl_dialect() -> None:
    reply = ask("POST", "/retrieve", json={"query": "lion", "topk": 1, "return_scores": True})
    (result,) = reply.json()["result"]
    assert [item["document"]["id"] for item in result] == ["a0"]


def test_exsearch_dialect() -> None:
    reply = ask("GET", "/api/search", params={"query": "the lion | & otter?", "k": 2})
    body = reply.json()
    assert body["query"] == "the lion | & otter?"
    assert [hit["rank"] for hit in body["topk"]] == [1, 2]
    assert body["topk"][0]["text"].split(" | ")[0] in ("Lion", "Otter")
    assert sum(hit["prob"] for hit in body["topk"]) == pytest.approx(1)


def test_exsearch_searches_for_as_many_as_are_asked_for_and_shares_answers() -> None:
    """Defect 8 of the original server: it searches for 100 and cuts, and takes "2" and 2 for different."""

    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        for k in ("2", "02"):
            reply = await client.get("/api/search", params={"query": "the lion", "k": k})
            (expected,) = FakeEngine().search(["the lion"], 2)
            assert [hit["score"] for hit in reply.json()["topk"]] == [hit.score for hit in expected]
        await client.post("/retrieve", json={"queries": ["the lion"], "topk": 2})
        assert engine.searches == [["the lion"]]

    with_server(scenario)


def test_concurrent_requests_are_searched_by_one_thread_in_few_batches() -> None:
    """Defect 4 of reference servers: forty threads over one index and encoder."""

    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        first = await hold(client, engine)
        asking = [
            asyncio.create_task(request)
            for i in range(20)
            for request in (
                client.post("/search", json={"query": f"lion {i}"}),
                client.post("/retrieve", json={"queries": [f"otter {i}"], "topk": 10}),
                client.get("/api/search", params={"query": f"eagle {i}"}),
            )
        ]
        while await metric(client, "exsearch_queue_queries") < 60:
            await asyncio.sleep(0.001)
        engine.gate.set()
        assert {reply.status_code for reply in await asyncio.gather(first, *asking)} == {200}
        assert len(engine.threads) == 1
        assert [len(batch) for batch in engine.searches] == [1, 60]

    with_server(scenario)


def test_exsearch_k_is_capped_and_has_a_default() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> list[int]:
        await client.request(
            "POST", "/passages", json={"passages": [{"id": str(i), "text": "x"} for i in range(200)]}
        )
        replies = [
            await client.get("/api/search", params={"query": "x"} | k) for k in ({}, {"k": 101}, {"k": 500})
        ]
        return [len(reply.json()["topk"]) for reply in replies]

    assert with_server(scenario) == [10, 100, 100]


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "told"),
    [
        ("POST", "/search", {"json": {"query": "a", "rerank": 10**9}}, 422, "at most 1000"),
        ("POST", "/search", {"json": {"queries": ["a"] * 4097}}, 422, "at most 4096"),
        ("POST", "/search", {"json": {"queries": ["a"] * 1000, "k": 66}}, 422, "at most 65536"),
        ("POST", "/search", {"json": {"query": "a", "method": "bm25"}}, 422, "no word index"),
        ("POST", "/search", {"json": {"query": "a", "filter": {"x": {"gt": 1, "lt": "b"}}}}, 422, "filter"),
        ("POST", "/search", {"json": {"queries": [1, 2]}}, 422, "queries.0: "),
        ("POST", "/retrieve", {"json": {"queries": "a"}}, 422, "queries"),
        ("POST", "/retrieve", {"json": {}}, 422, "queries"),
        ("GET", "/api/search", {}, 422, "query"),
        ("POST", "/passages", {"json": {"passages": []}}, 422, "passages"),
        ("POST", "/passages", {"json": {"passages": [{"id": "a0", "text": "x"}]}}, 422, "'a0' already"),
        ("DELETE", "/passages", {"json": {"ids": ["nowhere"]}}, 422, "'nowhere'"),
        ("GET", "/search", {}, 405, "Method Not Allowed"),
        ("GET", "/nowhere", {}, 404, "Not Found"),
        ("GET", "/search/", {}, 404, "Not Found"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    method: str, path: str, request_: dict[str, Any], status: int, told: str
) -> None:
    assert_refused(ask(method, path, **request_), status, told)


def assert_refused(reply: httpx.Response, status: int, told: str) -> None:
    assert reply.status_code == status
    body = reply.json()
    assert set(body) == {"error", "detail"}
    assert told in body["detail"]
    assert len(body["detail"]) < 500


DIALECTS = ["/search", "/retrieve", "one query to /retrieve", "/api/search"]


def question(dialect: str, query: str, k: Any) -> dict[str, Any]:
    """A request with one query for k passages."""
    match dialect:
        case "/search":
            return {"method": "POST", "url": "/search", "json": {"queries": [query], "k": k}}
        case "/retrieve":
            return {"method": "POST", "url": "/retrieve", "json": {"queries": [query], "topk": k}}
        case "one query to /retrieve":
            return {"method": "POST", "url": "/retrieve", "json": {"query": query, "topk": k}}
    return {"method": "GET", "url": f"/api/search?query={query}&k={k}"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_numbers_and_queries_that_make_no_sense_are_refused_in_every_dialect(dialect: str) -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        for k in (0, -1, -(10**30), "many", 1.5, True, "", [3]):
            assert_refused(await client.request(**question(dialect, "a", k)), 422, "k: ")
        assert_refused(await client.request(**question(dialect, "a", 10**9)), 422, "at most 1000")
        # An address that long is refused before it comes here.
        long = "x" * (60_000 if dialect == "/api/search" else 1_000_000)
        assert_refused(await client.request(**question(dialect, long, 3)), 422, "at most 8192")
        assert engine.searches == []
        assert (await client.request(**question(dialect, "a", 3))).status_code == 200

    with_server(scenario)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/search"), ("POST", "/retrieve"), ("POST", "/passages"), ("DELETE", "/passages")],
)
def test_bodies_that_make_no_sense_are_refused_by_every_route(method: str, path: str) -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        json_ = {"Content-Type": "application/json"}
        for content in (
            b"",
            b"{",
            b"\xff",
            b"{'query': 1}",
            b'{"query": "a"} and more',
            b'{"query": NaN}'[:-4],
        ):
            assert_refused(await client.request(method, path, content=content, headers=json_), 400, "JSON")
        for content in (
            b"[]",
            b"null",
            b"17",
            b'"query"',
            b"{}",
            b'{"queries": {}}',
            b'{"passages": 1, "ids": 1}',
        ):
            assert_refused(await client.request(method, path, content=content, headers=json_), 422, ": ")
        too_long = b'{"query": "' + b"x" * 8 * 2**20 + b'"}'
        assert_refused(await client.request(method, path, content=too_long, headers=json_), 413, "8,388,608")
        for headers in ({}, {"Content-Type": "text/plain"}):
            reply = await client.request(method, path, content=b'{"query": "a"}', headers=headers)
            assert_refused(reply, 415, "Content-Type")
        assert engine.searches == []
        assert (await client.get("/info")).json()["engine"]["count"] == 6

    with_server(scenario)


def test_failure_of_the_server_is_not_told_but_counted() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        reply = await client.post("/search", json={"query": "poison"})
        assert reply.status_code == 500
        assert reply.json() == {"error": "internal", "detail": "the server failed; its log says why"}
        assert 'exsearch_errors_total{kind="internal"} 1.0' in (await client.get("/metrics")).text
        assert (await client.post("/search", json={"query": "lion"})).status_code == 200

    with_server(scenario)


def test_repeated_question_is_searched_once() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        replies = [
            await client.post("/retrieve", json={"queries": [query]}) for query in ("lion", " lion", "lion")
        ]
        assert len({reply.content for reply in replies}) == 1
        assert engine.searches == [["lion"]]
        text = (await client.get("/metrics")).text
        assert 'exsearch_queries_total{source="kept"} 2.0' in text

    with_server(scenario)


def test_added_passage_is_found_and_deleted_one_is_not() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        async def best() -> Any:
            reply = await client.post("/search", json={"query": "zebra stripes", "k": 1})
            return reply.json()["results"][0]["hits"][0]["id"]

        assert await best() != "z"
        zebra = {"id": "z", "title": "Zebra", "text": "zebra stripes", "metadata": {"legs": 4}}
        added = (await client.post("/passages", json={"passages": [zebra]})).json()
        assert added == {"passages": 7, "index": engine.fingerprint}
        assert await best() == "z"
        deleted = (await client.request("DELETE", "/passages", json={"ids": ["z"]})).json()
        assert deleted == {"passages": 6, "index": engine.fingerprint}
        assert deleted["index"] != added["index"]
        assert await best() != "z"

    with_server(scenario)


def test_read_only_server_has_no_way_to_change_the_index() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        assert (await client.request("DELETE", "/passages", json={"ids": ["a0"]})).status_code == 404
        assert "/passages" not in (await client.get("/openapi.json")).json()["paths"]

    with_server(scenario, read_only=True)


def test_token_is_wanted_everywhere_but_for_health() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        right = {"Authorization": "Bearer secret"}
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            for path in ("/search", "/info", "/metrics", "/openapi.json", "/nowhere"):
                reply = await client.post(path, json={"query": "lion"}, headers=wrong)
                assert (reply.status_code, reply.json()["error"]) == (401, "unauthorised")
                assert reply.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/search", json={"query": "lion"}, headers=right)).status_code == 200
        schema = (await client.get("/openapi.json", headers=right)).json()
        assert schema["paths"]["/search"]["post"]["security"] == [{"token": []}]
        assert "security" not in schema["paths"]["/healthz"]["get"]

    with_server(scenario, token="secret")


def test_token_is_not_shown() -> None:
    assert "secret" not in repr(ServerSettings(token="secret"))


def test_info_and_metrics() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        info = (await client.get("/info")).json()
        assert info["index"] == engine.fingerprint
        assert info["engine"] == {"count": 6, "factory": "none"}
        await client.post("/search", json={"query": "lion"})
        text = (await client.get("/metrics")).text
        assert 'exsearch_requests_total{route="/search",status="200"} 1.0' in text
        assert 'exsearch_stage_seconds_count{stage="search"}' in text
        assert await metric(client, "exsearch_ready") == 1
        # The index was ready before, which nobody asked for.
        assert engine.is_warm
        assert await metric(client, "exsearch_batch_queries_count") == 1

    with_server(scenario)


def test_queries_are_refused_until_the_index_is_ready() -> None:
    may_load = threading.Event()

    def open_engine() -> FakeEngine:
        assert may_load.wait(timeout=30)
        return FakeEngine()

    async def scenario() -> None:
        async with running(open_engine, ready=False) as client:
            assert (await client.get("/healthz")).json() == {"state": "loading"}
            for reply in (await client.get("/readyz"), await client.post("/search", json={"query": "lion"})):
                assert reply.status_code == 503
                assert reply.headers["Retry-After"] == "1"
                assert "loading" in reply.json()["detail"]
            may_load.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.001)
            assert (await client.post("/search", json={"query": "lion"})).status_code == 200

    asyncio.run(scenario())


def test_index_that_cannot_be_opened_is_never_ready() -> None:
    def open_engine() -> FakeEngine:
        raise RetrieverError("the index is cut short")

    async def scenario() -> None:
        async with running(open_engine, ready=False) as client:
            while (await client.get("/healthz")).json() == {"state": "loading"}:
                await asyncio.sleep(0.001)
            assert (await client.get("/healthz")).json() == {"state": "failed"}
            assert (await client.get("/readyz")).status_code == 503

    asyncio.run(scenario())


def test_changes_of_another_process_are_looked_for() -> None:
    class Changing(FakeEngine):
        refreshed = 0

        def refresh(self) -> bool:
            Changing.refreshed += 1
            if Changing.refreshed == 1:
                raise RetrieverError("half of it is missing")
            return bool(self.delete(["a0"])) if "a0" in self._passages else False

    async def scenario() -> None:
        engine = Changing()
        async with running(lambda: engine, refresh_s=0.001) as client:
            while Changing.refreshed < 2:
                await asyncio.sleep(0.001)
            reply = await client.post("/search", json={"query": "lion", "k": 6})
            assert "a0" not in {hit["id"] for hit in reply.json()["results"][0]["hits"]}
            assert 'exsearch_errors_total{kind="refresh"} 1.0' in (await client.get("/metrics")).text

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "bad",
    [{"max_batch": 0}, {"deadline_s": -1.0}, {"token": ""}, {"token": "line\nbreak"}, {"cached_answers": -1}],
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(RetrieverError, match=next(iter(bad))):
        ServerSettings(**bad)


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(RetrieverError, match="max_k"):
        Limits(max_k=0)
