"""What a server does with too much, too slow and too late; over HTTP, with a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from retriever_service.service.limits import Limits
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.live_server import hold, metric, with_server


def test_body_is_read_no_further_than_its_limit() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1_000
            yield b" " * 1_000

    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        headers = {"Content-Type": "application/json"}
        reply = await client.post("/search", content=endless(), headers=headers)
        assert reply.status_code == 413
        assert "10,000 bytes" in reply.json()["detail"]
        declared = await client.post("/search", content=b" " * 10_001, headers=headers)
        assert declared.status_code == 413

    with_server(scenario, limits=Limits(max_body_bytes=10_000))
    assert sent == 11_000


def test_body_that_does_not_arrive_is_not_waited_for() -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"query": '
        await asyncio.sleep(30)

    reply = with_server(
        lambda client, engine: client.post(
            "/search", content=stalled(), headers={"Content-Type": "application/json"}
        ),
        body_deadline_s=0.01,
    )
    assert reply.status_code == 408


def test_full_queue_is_429_with_a_time_to_come_back() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        first = await hold(client, engine)
        waiting = asyncio.create_task(client.post("/search", json={"queries": ["lion", "otter"]}))
        while await metric(client, "exsearch_queue_queries") < 2:
            await asyncio.sleep(0.001)
        refused = await client.post("/retrieve", json={"queries": ["eagle"]})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"] == "overloaded"
        engine.gate.set()
        assert [(await task).status_code for task in (first, waiting)] == [200, 200]

    with_server(scenario, max_waiting=2)


@pytest.mark.parametrize(("asked_for", "settings"), [({"deadline_s": 1}, {}), ({}, {"deadline_s": 0.01})])
def test_deadline_is_504_and_nothing_is_searched(
    asked_for: dict[str, float], settings: dict[str, float]
) -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        first = await hold(client, engine)
        late = await client.post("/search", json={"query": "lion"} | asked_for)
        assert late.status_code == 504
        assert late.json()["error"] == "timeout"
        engine.gate.set()
        await first
        while not engine.searches or await metric(client, "exsearch_queue_queries"):
            await asyncio.sleep(0.001)
        # Behind every batch that was taken from the queue.
        await client.get("/info")
        assert engine.searches == [["first"]]

    with_server(scenario, **settings)


def test_client_that_hangs_up_is_not_searched_for() -> None:
    async def scenario(client: httpx.AsyncClient, engine: FakeEngine) -> None:
        first = await hold(client, engine)
        app = client._transport.app  # type: ignore[attr-defined]
        body = b'{"query": "gone"}'
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/search",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            pass

        await app(scope, receive, send)
        engine.gate.set()
        await first
        await client.post("/search", json={"query": "here"})
        assert engine.searches == [["first"], ["here"]]

    with_server(scenario)
