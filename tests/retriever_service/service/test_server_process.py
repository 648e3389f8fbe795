"""A server of its own process: signals, addresses, half requests."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from functools import partial

import httpx
import pytest

from retriever_service.errors import RetrieverError
from retriever_service.service.server import ServerSettings
from tests.retriever_service.support import ROOT, server_process

serving = partial(server_process, "tests.retriever_service.fake_engine")


@pytest.mark.component
def test_sigterm_answers_what_is_held_refuses_what_comes_and_ends_with_0() -> None:
    async def scenario(url: str, process: subprocess.Popen[str]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            held = [
                asyncio.create_task(client.post("/search", json={"query": query}))
                for query in ("slow", "lion")
            ]
            while (await client.get("/metrics")).text.count("exsearch_queue_queries 1.0") == 0:
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            while (ready := await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.001)
            assert "draining" in ready.json()["detail"]
            refused = await client.post("/search", json={"query": "otter"})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            assert [(await task).status_code for task in held] == [200, 200]

    with serving(max_batch=1) as (url, process):
        asyncio.run(scenario(url, process))
        assert process.wait(timeout=30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


@pytest.mark.component
def test_sigterm_ends_with_0_even_if_the_index_is_stuck() -> None:
    async def scenario(url: str, process: subprocess.Popen[str]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            held = asyncio.create_task(client.post("/search", json={"query": "slow"}))
            while (await client.get("/metrics")).text.count(
                'exsearch_queries_total{source="searched"} 1.0'
            ) == 0:
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            assert (await held).status_code == 503

    with serving(grace_s=0.0) as (url, process):
        asyncio.run(scenario(url, process))
        assert process.wait(timeout=30) == 0


@pytest.mark.component
def test_address_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = json.dumps({"port": taken.getsockname()[1]})
        command = [sys.executable, "-m", "tests.retriever_service.fake_engine", arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "RetrieverError: cannot listen on 127.0.0.1" in done.stderr


@pytest.mark.component
def test_half_a_request_and_nonsense_harm_nobody() -> None:
    with serving(body_deadline_s=0.1) as (url, _):
        address = (httpx.URL(url).host, httpx.URL(url).port)
        head = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        long = b"GET /api/search?query=" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        for sent, status in ((head + b'{"query"', b"408"), (long, b"4"), (b"\x16\x03\x01\r\n\r\n", b"400")):
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(100).startswith(b"HTTP/1.1 " + status)
        assert httpx.post(f"{url}/search", json={"query": "lion"}, timeout=60).status_code == 200


@pytest.mark.parametrize("port", [-1, 65_536])
def test_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(RetrieverError, match="65535"):
        ServerSettings(port=port)
