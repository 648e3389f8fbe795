"""Which questions are answered when: limits, deadlines, an engine that is lost, drain, reload.

Guarantees:
- an answer is made by one version of the model, from its first token to its last. A newer one waits until those in
  flight have ended; questions that come meanwhile wait too, and none is lost;
- the engine makes so many answers at once as it has room for, `max_waiting` more wait, others get 429 at once;
- every answer ends: by itself, by its deadline, because its client has gone, or with the server;
- an engine that was lost fails what it had in hand, and is started again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol, TypeVar

from pipeline.core.agents.program import EngineError, Sampling
from pipeline.core.agents.search import Event, OnEvent
from pipeline.core.errors import RunError
from pipeline.core.policies import Snapshot
from pipeline.core.records import Trajectory
from pipeline.serve.failures import RETRY_S, ApiError, not_answered
from pipeline.serve.metrics import ServeMetrics
from pipeline.serve.settings import ServeSettings
from retriever_service.errors import RetrieverError
from retriever_service.passages.hits import Hit
from retriever_service.service.lifecycle import State

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.1
_NOT_READY = {
    State.LOADING: "the model is being loaded",
    State.DRAINING: "it is being shut down",
    State.FAILED: "it ends, for it has failed",
}

Newer = Callable[[int], Snapshot | None]
"""The newest version of the model, if it is newer than this one; may read files."""


class Agent(Protocol):
    """What answers; see `actors.answering.AnsweringAgent`, whose methods say what they raise."""

    @property
    def version(self) -> int: ...

    async def start(self) -> int: ...

    def check(self, question: str) -> None: ...

    async def answer(self, question: str, sampling: Sampling, on_event: OnEvent) -> Trajectory: ...

    async def search(self, query: str, k: int) -> Sequence[Hit]: ...

    async def load(self, snapshot: Snapshot) -> None: ...

    async def until_lost(self) -> str: ...

    async def restart(self) -> None: ...

    async def close(self) -> None: ...


class Gate:
    """Answers pass; who closes it waits until those inside have left, and holds who comes meanwhile."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_open, self._is_empty = asyncio.Event(), asyncio.Event()
        self._is_open.set()
        self._is_empty.set()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        while not self._is_open.is_set():
            await self._is_open.wait()
        self._inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._is_empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """For one at a time."""
        self._is_open.clear()
        try:
            await self._is_empty.wait()
            yield
        finally:
            self._is_open.set()


class Service:
    """One agent behind limits. Belongs to the event loop that runs `start`.

    Args:
        newer: where newer versions come from; None if none will.
    """

    def __init__(self, settings: ServeSettings, agent: Agent, newer: Newer | None = None) -> None:
        self.settings, self.agent = settings, agent
        self.metrics = ServeMetrics()
        self.state = State.LOADING
        self.failure: Exception | None = None
        """Why nothing can be served any more; set before `failed`."""
        self.failed = asyncio.Event()
        self._newer = newer
        self._refused: set[int] = set()
        """Versions that could not be loaded."""
        self._look = asyncio.Event()
        self._gate = Gate()
        self._slots = asyncio.Semaphore(0)
        self._room = 0
        self._admitted: set[asyncio.Task[object]] = set()
        self._nobody_left = asyncio.Event()
        self._nobody_left.set()
        self._cut = False
        """What is in hand is being given up, since the server ends."""
        self._can_close = False
        self._is_loading = False
        self._background: list[asyncio.Task[None]] = []

    # ---------------------------------------------------------------- answers

    async def answer(
        self, question: str, sampling: Sampling, on_event: OnEvent = lambda event: None
    ) -> Trajectory:
        """One answer. Cancelled, it ends generation and search.

        Raises:
            ApiError: it could not be had; says why.
        """
        with self._in_hand():
            self.metrics.waiting.inc()
            started = False

            def begun() -> None:
                nonlocal started
                started = True
                self.metrics.waiting.dec()
                self.metrics.in_flight.inc()

            try:
                trajectory = await self._in_time(question, sampling, on_event, begun)
            finally:
                (self.metrics.in_flight if started else self.metrics.waiting).dec()
            self.metrics.note_answer(trajectory)
            if (failure := not_answered(trajectory)) is not None:
                logger.warning(f"an answer failed: {trajectory.stop_reason}: {trajectory.detail}")
                raise failure
            return trajectory

    async def _in_time(
        self, question: str, sampling: Sampling, on_event: OnEvent, begun: Callable[[], None]
    ) -> Trajectory:
        async with self._gate.passing():
            try:
                async with asyncio.timeout(self.settings.deadline_s), self._slots:
                    begun()
                    return await self.agent.answer(question, sampling, on_event)
            except TimeoutError as error:
                raise ApiError(
                    504, "deadline_exceeded", f"no answer within {self.settings.deadline_s:g} s"
                ) from error

    async def search(self, query: str, k: int) -> Sequence[Hit]:
        """The k best passages.

        Raises:
            ApiError: the server is not ready, or too much is waiting.
            RetrieverError, RetrieverUnavailable: the query is refused; nothing answers.
        """
        with self._in_hand():
            try:
                async with asyncio.timeout(self.settings.deadline_s):
                    return await self.agent.search(query, k)
            except TimeoutError as error:
                raise ApiError(
                    504, "deadline_exceeded", f"nothing found within {self.settings.deadline_s:g} s"
                ) from error

    async def until_ready(self) -> None:
        """Waits while the model is loaded.

        Raises:
            ApiError: it cannot be, or the server ends.
        """
        while self.state is State.LOADING:
            await asyncio.sleep(_POLL_S)
        self.check_ready()

    def check_ready(self) -> None:
        """
        Raises:
            ApiError: nothing is answered at the moment.
        """
        if self.state is not State.READY:
            raise ApiError(
                503,
                "not_ready",
                f"the server is not ready: {_NOT_READY[self.state]}",
                headers={"Retry-After": str(RETRY_S)},
            )

    @contextmanager
    def _in_hand(self) -> Iterator[None]:
        """A request that is being worked on by this task."""
        self.check_ready()
        if len(self._admitted) >= self._room + self.settings.max_waiting:
            raise ApiError(
                429,
                "too_many_requests",
                f"{len(self._admitted)} requests are in hand, and no more may wait",
                headers={"Retry-After": str(RETRY_S)},
            )
        task = asyncio.current_task()
        assert task is not None  # a request is always handled in a task
        self._admitted.add(task)
        self._nobody_left.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._cut:
                raise
            task.uncancel()
            raise ApiError(
                503, "shutting_down", "the server was shut down before the answer was there"
            ) from None
        finally:
            self._admitted.discard(task)
            if not self._admitted:
                self._nobody_left.set()

    # ---------------------------------------------------------------- from start to end

    def start(self) -> None:
        """Load the model, in the background."""
        self._in_background(self._become_ready())

    def look_now(self) -> None:
        """See at once whether there is a newer version."""
        self._look.set()

    async def drain(self) -> bool:
        """Take nothing new, and end the rest within the grace period; whether the agent could be closed."""
        if self.state is not State.DRAINING:
            # An engine that is starting cannot be ended, but with the process.
            self._can_close = self.state is not State.LOADING
            self.state = State.DRAINING
            self.metrics.ready.set(0)
            try:
                async with asyncio.timeout(self.settings.grace_s):
                    await self._nobody_left.wait()
            except TimeoutError:
                logger.warning(f"{len(self._admitted)} answers are given up after the grace period")
                self._cut = True
                for task in self._admitted:
                    task.cancel()
                await self._nobody_left.wait()
        return self._can_close

    async def close(self) -> None:
        """Drain, and end the agent."""
        at_rest = await self.drain()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if at_rest:
            await self.agent.close()

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        """What ends it unforeseen ends the server, with the reason: nobody else would hear of it."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_end)
        self._background.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the server cannot go on", exc_info=error)
            self._give_up(RunError(f"the server cannot go on: {type(error).__name__}: {error}"))

    async def _become_ready(self) -> None:
        try:
            room = await self.agent.start()
        except (RetrieverError, EngineError) as error:
            self._give_up(error if isinstance(error, RetrieverError) else RunError(str(error)))
            return
        self._room, self._slots = room, asyncio.Semaphore(room)
        self._say_ready()
        self._in_background(self._watch())
        if self._newer is not None:
            self._in_background(self._follow(self._newer))

    def _say_ready(self) -> None:
        self.metrics.version.set(self.agent.version)
        if self.state is State.LOADING:
            self.state = State.READY
            self.metrics.ready.set(1)
            logger.info(f"ready: version {self.agent.version}, {self._room} answers at once")

    def _give_up(self, failure: Exception) -> None:
        self.state, self.failure = State.FAILED, failure
        self.metrics.ready.set(0)
        self.failed.set()

    # ---------------------------------------------------------------- an engine that is lost, a newer model

    async def _watch(self) -> None:
        while True:
            cause = await self.agent.until_lost()
            if self.state in (State.DRAINING, State.FAILED):
                return
            if self.state is State.LOADING or self._is_loading:
                # Whoever loads finds out, and does what is to be done.
                await asyncio.sleep(_POLL_S)
                continue
            logger.error(f"the engine is lost: {cause}")
            await self._bring_back()

    async def _bring_back(self) -> None:
        if self.state is State.DRAINING:
            return
        self.state = State.LOADING
        self.metrics.ready.set(0)
        for attempt in range(self.settings.max_restarts + 1):
            self.metrics.restarts.inc()
            try:
                await self.agent.restart()
            # Whatever it was, the next start may succeed.
            except Exception as error:
                logger.error(f"start {attempt + 1} of another engine failed", exc_info=error)
                last = str(error)
            else:
                self._say_ready()
                return
        self._give_up(
            RunError(f"the engine was lost, and {attempt + 1} starts of another failed; last: {last}")
        )

    async def _follow(self, newer: Newer) -> None:
        while True:
            await _within(self._look.wait(), self.settings.follow_s)
            self._look.clear()
            if self.state is not State.READY:
                continue
            try:
                found = await asyncio.to_thread(newer, self.agent.version)
            # The version that answers stays good, and the next look may succeed.
            except Exception as error:
                self.metrics.note_error("follow")
                logger.error("a newer version cannot be looked for", exc_info=error)
                continue
            if found is not None and found.version not in self._refused:
                await self._load(found)

    async def _load(self, snapshot: Snapshot) -> None:
        """Answer with another version from now on; if it cannot be loaded, with the one before."""
        async with self._gate.closed():
            self._is_loading = True
            try:
                await self.agent.load(snapshot)
            # Whatever it was, another engine answers with the version before.
            except Exception as error:
                self._refused.add(snapshot.version)
                self.metrics.note_error("reload")
                logger.error(
                    f"version {snapshot.version} ({snapshot.model}) cannot be loaded", exc_info=error
                )
                await self._bring_back()
                return
            finally:
                self._is_loading = False
        self.metrics.reloads.inc()
        self.metrics.version.set(snapshot.version)
        logger.info(f"answers with version {snapshot.version} ({snapshot.model})")


async def _within(work: Awaitable[T], seconds: float) -> T | None:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return None


async def events_of(
    service: Service, question: str, sampling: Sampling, idle_s: float
) -> AsyncGenerator[Event | Trajectory | None, None]:
    """The steps of an answer as they happen, then the answer; None where nothing happened for `idle_s` seconds.

    A consumer that stops ends the answer.

    Raises:
        ApiError: as `Service.answer`.
    """
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    answering = asyncio.create_task(service.answer(question, sampling, events.put_nowait))
    answering.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), idle_s)
            except TimeoutError:
                yield None
                continue
            if event is None:
                break
            if event.kind != "stop":
                yield event
        yield await answering
    finally:
        answering.cancel()
        await asyncio.wait([answering])
