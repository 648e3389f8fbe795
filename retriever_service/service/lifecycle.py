"""The searcher behind a server, from its loading to its end.

    loading --> ready --> draining
       \\--> failed

Guarantees:
- `ready` means that the index is loaded and was searched in every way that it can be, so that no first search is slow;
- from `draining` on nothing new is taken, and what was taken before is answered within the grace period.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from retriever_service.errors import RetrieverOverloaded, RetrieverTimeout, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Searcher, SearchOptions
from retriever_service.service.batching import Answers, BatchingSearcher
from retriever_service.service.cache import CachingSearcher
from retriever_service.service.metrics import Metrics
from retriever_service.service.settings import ServerSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_WAITING_UPDATES = 16


class Engine(Searcher, Protocol):
    """A searcher whose index can change while it is served. All calls come from one thread."""

    on_stage: Callable[[str, float], None] | None
    """Told the name (`encode`, `search`, `rerank`, `fetch`) and seconds of every stage of every search."""

    def first_search(self) -> None:
        """Make sure that the first searches are as fast as later ones; not counted as a search."""
        ...

    def add(self, passages: Sequence[Passage]) -> int:
        """Add passages, durably; how many there are now."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Delete passages, durably; how many there are now."""
        ...

    def refresh(self) -> object:
        """Go over to the newest state of the index, if another process made one."""
        ...

    def info(self) -> dict[str, Any]:
        """What is being searched: JSON."""
        ...

    def close(self) -> None:
        """The last call: let go of what would not end by itself."""
        ...


class State(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """One engine behind batches and a cache. Belongs to the event loop that runs `start`.

    Args:
        open_engine: makes the engine; called in the owner thread.
    """

    def __init__(self, settings: ServerSettings, open_engine: Callable[[], Engine]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.state = State.LOADING
        self.failure: Exception | None = None
        """Why the engine cannot be served; set before `failed`."""
        self.failed = asyncio.Event()
        self._open_engine = open_engine
        self._waiting_updates = 0
        self._at_rest = False
        self._engine: Engine | None = None
        self._background: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Load the engine, in the background."""
        self._batcher: BatchingSearcher[Engine] = BatchingSearcher(
            self._load,
            max_batch=self.settings.max_batch,
            max_waiting=self.settings.max_waiting,
            on_batch=self.metrics.note_batch,
        )
        self._cache = CachingSearcher(self._batcher, max_answers=self.settings.cached_answers)
        self.metrics.watch(self._batcher, self._cache)
        self._loading = asyncio.create_task(self._become_ready())
        if self.settings.refresh_s:
            self._background.append(asyncio.create_task(self._keep_fresh()))

    async def ask(self, queries: Sequence[str], k: int, options: SearchOptions, deadline_s: float) -> Answers:
        """As `BatchingSearcher.ask`; RetrieverUnavailable unless the service is ready."""
        self._check_ready()
        return await self._cache.ask(queries, k, options, deadline_s)

    async def run(self, function: Callable[[Engine], T]) -> tuple[T, str]:
        """What `function` gives for the engine, called between two batches, and the fingerprint behind it.

        Raises:
            RetrieverOverloaded: too many such calls are waiting.
            RetrieverTimeout: not done within `update_deadline_s`; it may still be done.
            RetrieverUnavailable: the service is not ready.
            Whatever `function` raises.
        """
        self._check_ready()
        if self._waiting_updates >= _MAX_WAITING_UPDATES:
            raise RetrieverOverloaded(f"{self._waiting_updates} updates are waiting", retry_after_s=10.0)
        self._waiting_updates += 1
        running = asyncio.ensure_future(
            self._batcher.run(lambda engine: (function(engine), engine.fingerprint))
        )
        try:
            await asyncio.wait([running], timeout=self.settings.update_deadline_s)
            if not running.done():
                raise RetrieverTimeout(
                    f"not done within {self.settings.update_deadline_s} s, but it may still be: see /info"
                )
            return running.result()
        finally:
            self._waiting_updates -= 1
            running.cancel()

    async def drain(self) -> bool:
        """Take nothing new, answer the rest; whether that was all done within the grace period."""
        if self.state is not State.DRAINING:
            self.state = State.DRAINING
            self.metrics.ready.set(0)
            for task in self._background:
                task.cancel()
            self._at_rest = await self._batcher.drain(self.settings.grace_s)
        return self._at_rest

    async def close(self) -> None:
        """Drain, close the engine, and let the owner thread end."""
        await self.drain()
        self._loading.cancel()
        await asyncio.wait([self._loading])
        self._batcher.close()
        if self._at_rest and self._engine is not None:
            self._engine.close()

    def _check_ready(self) -> None:
        if self.state is not State.READY:
            raise RetrieverUnavailable(f"the retriever is not ready: {self.state}")

    def _load(self) -> Engine:
        self._engine = self._open_engine()
        self._engine.first_search()
        self._engine.on_stage = self.metrics.note_stage
        return self._engine

    async def _become_ready(self) -> None:
        try:
            fingerprint = await self._batcher.ready()
        except Exception as error:
            logger.error(f"the index cannot be served: {error}")
            self.state = State.FAILED
            self.failure = error
            self.failed.set()
            return
        if self.state is State.LOADING:
            self.state = State.READY
            self.metrics.ready.set(1)
            logger.info(f"ready: index {fingerprint}")

    async def _keep_fresh(self) -> None:
        await asyncio.wait([self._loading])
        while self.state is State.READY:
            await asyncio.sleep(self.settings.refresh_s)
            try:
                await self._batcher.run(lambda engine: engine.refresh())
            # The state that is being served stays good, and the next one may be.
            except Exception as error:
                self.metrics.note_error("refresh")
                logger.error("the index has changed and cannot be opened anew", exc_info=error)
