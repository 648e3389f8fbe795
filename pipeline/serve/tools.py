"""The agent as tools for other agents, by the Model Context Protocol.

search   passages for a query
ask      an answer to a question, with its citations and the searches that led to it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Annotated, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from pipeline.core.agents.program import GREEDY
from pipeline.core.agents.search import Event
from pipeline.serve.conversation import Said, question_of
from pipeline.serve.failures import as_api_error
from pipeline.serve.service import Service
from pipeline.serve.told import cited, in_words
from retriever_service.service.running import stopping

T = TypeVar("T")

MOST_PASSAGES = 100
_READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class FoundPassage(BaseModel):
    """A passage that a search found."""

    id: str
    title: str
    text: str
    score: float = Field(description="Higher is better.")


class Found(BaseModel):
    """What a search found, the best first."""

    passages: list[FoundPassage]


class Cited(BaseModel):
    """A passage that an answer comes from: the characters from `start` to `end` of its text or title say so."""

    passage_id: str
    title: str
    step: int = Field(description="Which of `searches` found it, from 0.")
    field: str = Field(description="text or title.")
    start: int
    end: int
    quotes: str = Field(description="What they are: the answer itself, or what the agent wrote down.")


class Answered(BaseModel):
    """An answer, and how it was come by."""

    answer: str = Field(description="Empty if the agent found none.")
    stop_reason: str = Field(
        description="Why the agent ended: answered, step_limit, length_limit or malformed."
    )
    citations: list[Cited]
    searches: list[str]


def tools_of(
    service: Service,
    lifespan: Callable[[MCPServer[None]], AbstractAsyncContextManager[None]] | None = None,
) -> MCPServer[None]:
    """The tools of a service. A call waits while the model is loaded, and has the service's limits and deadline."""
    server: MCPServer[None] = MCPServer(
        "exsearch",
        title="ExSearch",
        version=version("exsearch"),
        instructions="Searches a collection of passages, and answers questions from it in several steps.",
        lifespan=lifespan,
    )

    @server.tool(annotations=_READ_ONLY)
    async def search(
        query: Annotated[str, Field(min_length=1, description="What to look for, in words.")],
        k: Annotated[int, Field(ge=1, le=MOST_PASSAGES, description="Passages wanted.")] = 5,
    ) -> Found:
        """Find the passages of the collection that fit a query best."""
        hits = await _told(_when_ready(service, lambda: service.search(query, k)))
        return Found(
            passages=[
                FoundPassage(id=h.passage.id, title=h.passage.title, text=h.passage.text, score=h.score)
                for h in hits
            ]
        )

    @server.tool(annotations=_READ_ONLY)
    async def ask(
        question: Annotated[str, Field(description="A question that the collection may answer.")],
        context: Context[None],
    ) -> Answered:
        """Have the search agent answer a question: it thinks, searches and writes down evidence, several times."""
        steps: asyncio.Queue[Event] = asyncio.Queue()
        asked = question_of_one(question)
        telling = asyncio.create_task(_tell(steps, context))
        try:
            trajectory = await _told(
                _when_ready(service, lambda: service.answer(asked, GREEDY, steps.put_nowait))
            )
        finally:
            telling.cancel()
        return Answered(
            answer=trajectory.answer,
            stop_reason=trajectory.stop_reason.value,
            citations=[Cited(**citation.as_json()) for citation in cited(trajectory)],
            searches=[step.query for step in trajectory.steps if not step.action],
        )

    def question_of_one(text: str) -> str:
        try:
            question = question_of([Said("user", text, "question")])
            service.agent.check(question)
        except Exception as error:  # it is the caller's to know, as in `_told`
            raise ToolError(as_api_error(error).detail) from error
        return question

    return server


async def _when_ready(service: Service, work: Callable[[], Awaitable[T]]) -> T:
    await service.until_ready()
    return await work()


async def _told(work: Awaitable[T]) -> T:
    """
    Raises:
        ToolError: what went wrong, as any client is told of it.
    """
    try:
        return await work
    # Here every failure ends, as in a route of the HTTP server.
    except Exception as error:
        failure = as_api_error(error)
        raise ToolError(f"{failure.kind}: {failure.detail}") from error


async def _tell(steps: asyncio.Queue[Event], context: Context[None]) -> None:
    """Tell of the steps, to a client that wants to know."""
    number = 0
    while True:
        if words := in_words(await steps.get()).strip():
            number += 1
            await context.report_progress(number, message=words)


async def serve_stdio(service: Service) -> bool:
    """Serve on standard input and output until the client closes them, or SIGTERM; whether the agent came to rest.

    What else is printed meanwhile, by libraries too, goes to standard error.

    Raises:
        Whatever is the service's `failure`.
    """

    @asynccontextmanager
    async def alive(server: MCPServer[None]) -> AsyncIterator[None]:
        service.start()
        yield

    async with stopping() as stop:
        serving = asyncio.create_task(tools_of(service, alive).run_stdio_async())
        ends = [asyncio.create_task(event.wait()) for event in (stop, service.failed)]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        at_rest = await service.drain()
        await service.close()
        for task in (serving, *ends):
            task.cancel()
    if service.failure is not None:
        raise service.failure
    # What reads standard input ends with the process alone.
    return at_rest and serving.done()
