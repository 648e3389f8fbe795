"""An agent that plays a script, and a server around it in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import numpy as np
import openai
import uvicorn

from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import Event, OnEvent
from pipeline.core.errors import UserError
from pipeline.core.policies import Snapshot
from pipeline.core.records import Step, StopReason, Trajectory
from pipeline.serve.app import create_app
from pipeline.serve.service import Agent, Newer, Service
from pipeline.serve.settings import ServeSettings
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit
from retriever_service.service.hosts import own_names
from retriever_service.service.lifecycle import State
from retriever_service.service.listening import listen, url_of

T = TypeVar("T")

HARP = Hit(Passage("p1", "Silver Harp", "The Silver Harp is made by Orvane."), 0.9)
ORVANE = Hit(Passage("p2", "Orvane", "Orvane was founded by Mara  Velin in 1984."), 0.7)
QUESTION = "Who founded the maker of the Silver Harp?"
WAIT_S = 300
"""Bound of every wait in these tests, in seconds; none should come near it."""


def trajectory_of(
    answer: str = "Mara Velin",
    stop_reason: StopReason = StopReason.ANSWERED,
    *,
    version: int = 1,
    steps: tuple[Step, ...] = (
        Step("Who makes the Silver Harp?", (HARP,), record="The Silver Harp is made by Orvane."),
        Step("Who founded Orvane?", (ORVANE,), record="Mara Velin"),
    ),
) -> Trajectory:
    """Ten tokens: four of the prompt, four written before the answer, two of the answer."""
    written = np.array([False] * 4 + [True] * 6)
    return Trajectory(
        question_id="asked",
        sample=0,
        policy_version=version,
        token_ids=np.arange(10, dtype=np.int32),
        loss_mask=written,
        logprobs=np.where(written, -0.5, np.nan).astype(np.float32),
        answer_start=8,
        steps=steps,
        answer=answer,
        stop_reason=stop_reason,
    )


class StandIn:
    """In place of `actors.answering.AnsweringAgent`: thinks, searches, records, waits for `go_on`, answers.

    Args:
        room: answers at once.
    """

    def __init__(self, room: int = 4) -> None:
        self.room, self.version = room, 1
        self.outcome = trajectory_of()
        self.go_on = threading.Event()
        self.go_on.set()
        self.asked: list[tuple[str, Sampling]] = []
        self.in_flight = self.most_in_flight = self.cancelled = self.starts = 0
        self.loaded: list[Snapshot] = []
        self.lost = threading.Event()
        self.fails_to_start: Exception | None = None
        self.fails_to_load: Exception | None = None
        self.fails_to_watch: Exception | None = None
        self.failure: Exception | None = None
        self.is_closed = False

    async def start(self) -> int:
        self.starts += 1
        if self.fails_to_start is not None:
            raise self.fails_to_start
        return self.room

    def check(self, question: str) -> None:
        if len(question) > 10_000:
            raise UserError("the question is too long")

    async def answer(self, question: str, sampling: Sampling, on_event: OnEvent) -> Trajectory:
        self.asked.append((question, sampling))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        version, engine = self.version, self.starts
        try:
            for step in self.outcome.steps:
                on_event(Event("think", step.query))
                on_event(Event("search", step.query, step.hits))
                on_event(Event("record", step.record))
            while not self.go_on.is_set():
                if self.lost.is_set() or self.starts != engine:
                    return trajectory_of("", StopReason.ENGINE_ERROR, version=version)
                await asyncio.sleep(0.005)
            if self.failure is not None:
                raise self.failure
            if self.outcome.answer:
                on_event(Event("answer", self.outcome.answer))
            on_event(Event("stop", self.outcome.stop_reason.value))
            return replace(self.outcome, policy_version=version)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def search(self, query: str, k: int) -> Sequence[Hit]:
        return [HARP, ORVANE][:k]

    async def load(self, snapshot: Snapshot) -> None:
        assert self.in_flight == 0, "an answer would be made by two versions"
        if self.fails_to_load is not None:
            raise self.fails_to_load
        self.loaded.append(snapshot)
        self.version = snapshot.version

    async def until_lost(self) -> str:
        while not self.lost.is_set():
            if self.fails_to_watch is not None:
                raise self.fails_to_watch
            await asyncio.sleep(0.005)
        return "its process died"

    async def restart(self) -> None:
        self.starts += 1
        if self.fails_to_start is not None:
            raise self.fails_to_start
        self.lost.clear()

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class Running:
    """A server that runs, and ways to it."""

    url: str
    agent: Any
    service: Service
    loop: asyncio.AbstractEventLoop
    wait_s: float = WAIT_S

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=self.wait_s)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=self.wait_s)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(self.wait_s)

    def ask(self, **changes: Any) -> httpx.Response:
        body = {"model": "exsearch", "messages": [{"role": "user", "content": QUESTION}], **changes}
        with self.http as client:
            return client.post("/v1/chat/completions", json=body)


@contextlib.contextmanager
def serving(
    agent: Agent | None = None,
    newer: Newer | None = None,
    *,
    ready: bool = True,
    wait_s: float = WAIT_S,
    **settings: Any,
) -> Iterator[Running]:
    """A server until the block ends, around a stand-in or another agent that starts within `wait_s` seconds."""
    agent = agent or StandIn()
    service = Service(ServeSettings(**{"grace_s": 0.05, "follow_s": 0.01} | settings), agent, newer)
    with contextlib.closing(listen("127.0.0.1", 0, backlog=64)) as listener:
        hosts = own_names("127.0.0.1", url_of(listener), service.settings.allowed_hosts)
        config = uvicorn.Config(
            create_app(service, hosts),
            log_config=None,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        loop = asyncio.new_event_loop()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(server.serve(sockets=[listener]))

        thread = threading.Thread(target=run)
        thread.start()
        running = Running(url_of(listener), agent, service, loop, wait_s)
        try:
            if ready:
                until(lambda: service.state is State.READY, wait_s)
            yield running
        finally:
            if isinstance(agent, StandIn):
                agent.go_on.set()
            server.should_exit = True
            thread.join(wait_s)
            loop.close()


def until(holds: Any, wait_s: float = WAIT_S) -> None:
    """Waits until something holds."""
    limit = threading.Event()
    every_s = 0.01 if wait_s <= WAIT_S else 0.2
    for _ in range(int(wait_s / every_s)):
        if holds():
            return
        limit.wait(every_s)
    raise AssertionError("it never came true")
