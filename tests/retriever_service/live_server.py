"""A server in this process, over a fake engine, for tests of its routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx

from retriever_service.service.server import Engine, ServerSettings, create_app
from tests.retriever_service.fake_engine import FakeEngine


@contextlib.asynccontextmanager
async def running(
    open_engine: Callable[[], Engine], *, ready: bool = True, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which runs in this event loop."""
    app = create_app(ServerSettings(**{"grace_s": 0.01, "refresh_s": 0.0} | settings), open_engine)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server") as client,
    ):
        while ready and (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.001)
        yield client


def with_server(
    scenario: Callable[[httpx.AsyncClient, FakeEngine], Coroutine[Any, Any, Any]], **settings: Any
) -> Any:
    """The result of `scenario`, run against a server that is ready."""

    async def run() -> Any:
        engine = FakeEngine()
        try:
            async with running(lambda: engine, **settings) as client:
                return await scenario(client, engine)
        finally:
            engine.gate.set()

    return asyncio.run(run())


def ask(method: str, path: str, **request: Any) -> httpx.Response:
    """The reply to one request."""
    return with_server(lambda client, engine: client.request(method, path, **request))  # type: ignore[no-any-return]


async def hold(client: httpx.AsyncClient, engine: FakeEngine) -> asyncio.Task[httpx.Response]:
    """A request that keeps the engine busy until the gate is opened."""
    engine.gate.clear()
    first = asyncio.create_task(client.post("/search", json={"query": "first"}))
    while not engine.held:
        await asyncio.sleep(0.001)
    return first


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))
