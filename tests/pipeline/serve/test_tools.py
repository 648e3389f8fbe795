"""The tools as the official client of the protocol meets them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from mcp.client import Client

from pipeline.core.records import StopReason
from pipeline.serve.service import Service
from pipeline.serve.settings import ServeSettings
from pipeline.serve.tools import tools_of
from tests.pipeline.serve_support import QUESTION, WAIT_S, StandIn, serving, trajectory_of


def with_client(agent: StandIn, work: Any, **settings: Any) -> Any:
    """What `work` gives for a client of this agent's tools."""

    async def run() -> Any:
        service = Service(ServeSettings(**settings), agent)
        service.start()
        try:
            async with asyncio.timeout(WAIT_S), Client(tools_of(service)) as client:
                return await work(client)
        finally:
            await service.close()

    return asyncio.run(run())


def call(agent: StandIn, name: str, arguments: dict[str, Any], **settings: Any) -> Any:
    async def work(client: Client) -> Any:
        return await client.call_tool(name, arguments)

    return with_client(agent, work, **settings)


def test_both_tools_are_described() -> None:
    async def work(client: Client) -> Any:
        return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in with_client(StandIn(), work)}
    assert sorted(tools) == ["ask", "search"]
    assert all(tool.description and tool.output_schema for tool in tools.values())
    assert tools["search"].input_schema["required"] == ["query"]


def test_search_gives_passages() -> None:
    found = call(StandIn(), "search", {"query": "harp", "k": 1})
    (passage,) = found.structured_content["passages"]
    assert (passage["id"], passage["title"]) == ("p1", "Silver Harp")


def test_ask_gives_an_answer_with_citations_and_searches() -> None:
    agent = StandIn()
    found = call(agent, "ask", {"question": QUESTION}).structured_content
    assert (found["answer"], found["stop_reason"]) == ("Mara Velin", "answered")
    assert found["searches"] == ["Who makes the Silver Harp?", "Who founded Orvane?"]
    assert found["citations"][0]["passage_id"] == "p2"
    assert agent.asked[0][0] == QUESTION


@pytest.mark.parametrize(
    ("arguments", "settings", "word"),
    [({"question": "  "}, {}, "empty"), ({"question": QUESTION}, {"deadline_s": 0.05}, "deadline_exceeded")],
)
def test_failures_are_told_in_words(arguments: dict[str, Any], settings: dict[str, Any], word: str) -> None:
    agent = StandIn()
    agent.go_on.clear()
    result = call(agent, "ask", arguments, **settings)
    assert result.is_error and word in result.content[0].text


def test_a_lost_engine_is_told_in_words() -> None:
    agent = StandIn()
    agent.outcome = trajectory_of("", StopReason.ENGINE_ERROR)
    result = call(agent, "ask", {"question": QUESTION})
    assert result.is_error and "engine_error" in result.content[0].text


def test_the_same_tools_are_on_the_server_over_http() -> None:
    async def ask(url: str) -> Any:
        async with asyncio.timeout(WAIT_S), Client(f"{url}/mcp") as client:
            return await client.call_tool("ask", {"question": QUESTION})

    with serving() as server:
        found: Coroutine[Any, Any, Any] = ask(server.url)
        assert asyncio.run(found).structured_content["answer"] == "Mara Velin"
