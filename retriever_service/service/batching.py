"""Many callers, one searcher: concurrent requests become batches.

Guarantees:
- requests that arrive while a batch is being searched form the next batch. An idle searcher answers at once, unless it
  is told to wait a little for more (`wait_s`): small batches cost several times as much per query;
- one thread owns the searcher (a GPU index may not even be read by two threads);
- an answer is that of a plain search: only requests with the same k and options are searched together, and a
  failure among them is no other request's;
- waiting queries are bounded: beyond `max_waiting` a request fails at once with `RetrieverOverloaded`;
- a request whose caller has gone, or whose deadline has passed, is not searched for;
- all hits of one request come from one state of the index.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from retriever_service.errors import RetrieverOverloaded, RetrieverTimeout, RetrieverUnavailable
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, Searcher, SearchOptions, check_request

S = TypeVar("S", bound=Searcher)
T = TypeVar("T")

_RATE_MEMORY = 0.8
"""Share of the past in the moving average of seconds per query."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The hits of each query of one request, and the fingerprint of the searcher that found them."""

    hits: tuple[tuple[Hit, ...], ...]
    fingerprint: str

    def lists(self) -> list[list[Hit]]:
        """The hits as `Searcher.search` gives them; the caller's own lists."""
        return [list(hits) for hits in self.hits]


@dataclass(frozen=True, slots=True)
class RetrieverStats:
    """What a retriever did since its start."""

    queries: int
    batches: int
    busy_s: float
    """Seconds in which the owner thread was searching."""
    waiting: int
    """Queries that wait for the next batch now."""
    in_hand_s: float
    """Seconds for which the owner thread has been searching for one and the same batch; 0 while it is idle or loads."""

    @property
    def mean_batch(self) -> float:
        """Queries per batch."""
        return self.queries / self.batches if self.batches else 0.0


@dataclass(slots=True, eq=False)
class _Request:
    queries: Sequence[str]
    k: int
    options: SearchOptions
    reply: asyncio.Future[Answers]
    arrived: float
    """On the event loop's clock."""


class BatchingSearcher(Generic[S]):
    """Turns concurrent requests into batches for one searcher. Its coroutines belong to one event loop.

    Args:
        load: makes the searcher; called once, in the owner thread. Failures come out of `ready` and `search`.
        max_batch: most queries in one batch (a longer single request is still one batch).
        max_waiting: most queries that may wait.
        wait_s: the longest that a request waits for others while the searcher is idle and the batch not full.
        on_batch: told the queries and seconds of every batch, in the owner thread.
    """

    def __init__(
        self,
        load: Callable[[], S],
        *,
        max_batch: int = 128,
        max_waiting: int = 65_536,
        wait_s: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.fingerprint: str | None = None
        """Of the searcher as it is now; None until it is loaded."""
        self.waiting = 0
        """Queries that wait for the next batch now."""
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self._no_more_waiting = asyncio.Event()  # the next batch is full, or the last
        self._on_batch = on_batch
        self._owner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retriever")
        self._searcher: Future[S] = self._owner.submit(self._load, load)
        self._requests: deque[_Request] = deque()
        self._searching: list[_Request] = []
        self._serving: asyncio.Task[None] | None = None
        self._draining = False
        self._num_queries = self._num_batches = 0
        self._busy_s = 0.0
        self._began: float | None = None  # with the batch in hand
        self._query_s: float | None = None

    async def ready(self) -> str:
        """Wait until the searcher is loaded; its fingerprint.

        Raises:
            RetrieverError: the index or encoder is unusable.
        """
        return (await asyncio.shield(asyncio.wrap_future(self._searcher))).fingerprint

    async def stats(self) -> RetrieverStats:
        """Counters since the start."""
        began = self._began
        in_hand_s = 0.0 if began is None else time.perf_counter() - began
        return RetrieverStats(self._num_queries, self._num_batches, self._busy_s, self.waiting, in_hand_s)

    async def search(
        self,
        queries: Sequence[str],
        k: int,
        options: SearchOptions = DEFAULT_OPTIONS,
        deadline_s: float | None = None,
    ) -> list[list[Hit]]:
        """The best `k` passages of each query; as `ask`, without the fingerprint."""
        return (await self.ask(queries, k, options, deadline_s)).lists()

    async def ask(
        self,
        queries: Sequence[str],
        k: int,
        options: SearchOptions = DEFAULT_OPTIONS,
        deadline_s: float | None = None,
    ) -> Answers:
        """The best `k` passages of each query.

        Raises:
            RetrieverError: a bad request (or see `ready`).
            RetrieverOverloaded: too many queries are waiting.
            RetrieverTimeout: not answered within `deadline_s` seconds.
            RetrieverUnavailable: the retriever is being shut down.
        """
        reply = self.submit(queries, k, options)
        try:
            await asyncio.wait([reply], timeout=deadline_s)
            if not reply.done():
                raise RetrieverTimeout(f"no answer within {deadline_s} s; {self.waiting} queries are waiting")
            return reply.result()
        finally:
            reply.cancel()

    def submit(self, queries: Sequence[str], k: int, options: SearchOptions) -> asyncio.Future[Answers]:
        """Let a request wait for the next batch. Cancel the future, and it is not searched for.

        Raises:
            As `ask`, without the timeout.
        """
        check_request(queries, k)
        if self._draining:
            raise RetrieverUnavailable("the retriever is being shut down")
        if self.waiting and self.waiting + len(queries) > self._max_waiting:
            raise RetrieverOverloaded(
                f"{self.waiting} queries are waiting (limit {self._max_waiting})",
                retry_after_s=self.waiting * (self._query_s or 0.0),
            )
        loop = asyncio.get_running_loop()
        request = _Request(queries, k, options, loop.create_future(), loop.time())
        self._requests.append(request)
        self.waiting += len(queries)
        if self.waiting >= self._max_batch:
            self._no_more_waiting.set()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return request.reply

    async def run(self, function: Callable[[S], T]) -> T:
        """Call `function` with the searcher, in the owner thread, between two batches.

        If the caller is cancelled, a function that has begun is finished all the same.

        Raises:
            RetrieverUnavailable: the retriever is being shut down.
            Whatever `function` raises.
        """
        if self._draining:
            raise RetrieverUnavailable("the retriever is being shut down")
        return await asyncio.wrap_future(self._owner.submit(self._call, function))

    async def drain(self, grace_s: float) -> bool:
        """Take no more requests, and answer those that wait within `grace_s` seconds; the others fail.

        Returns:
            Whether the owner thread came to rest. False also while the searcher is still being loaded and
            nobody waits for it.
        """
        self._draining = True
        self._no_more_waiting.set()
        if not self._requests and not self._searcher.done():
            return False
        idle = asyncio.ensure_future(self._come_to_rest())
        await asyncio.wait([idle], timeout=grace_s)
        if idle.done():
            return True
        idle.cancel()
        for request in (*self._searching, *self._requests):
            if not request.reply.done():
                request.reply.set_exception(
                    RetrieverUnavailable(f"shut down: not answered within the {grace_s} s that were left")
                )
        return False

    def close(self) -> None:
        """Take no more requests; the owner thread ends once it has finished what it is doing."""
        self._draining = True
        self._owner.shutdown(wait=False, cancel_futures=True)

    async def _come_to_rest(self) -> None:
        if self._serving is not None:
            await asyncio.wait([self._serving])
        # Whatever was given to the owner before this has been done when it has done this.
        await asyncio.wrap_future(self._owner.submit(lambda: None))

    async def _serve(self) -> None:
        """Answer batch after batch until nobody waits."""
        # Callers that became runnable together with the first one get a turn to join its batch.
        await asyncio.sleep(0)
        while batch := await self._next_batch():
            self._searching = batch
            try:
                outcomes = await asyncio.wrap_future(self._owner.submit(self._search_batch, batch))
            # Whatever ended the search of a whole batch is its callers' to know, and the next ones must be answered.
            except Exception as error:
                outcomes = [error] * len(batch)
            self._searching = []
            for request, outcome in zip(batch, outcomes, strict=True):
                if request.reply.done():
                    continue
                if isinstance(outcome, Exception):
                    request.reply.set_exception(outcome)
                else:
                    request.reply.set_result(outcome)

    async def _next_batch(self) -> list[_Request]:
        """Take waiting requests in order, up to `max_batch` queries; drop those whose caller has gone."""
        if self._requests and self._wait_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._requests[0].arrived + self._wait_s):
                    await self._no_more_waiting.wait()
        batch: list[_Request] = []
        size = 0
        while self._requests and (not batch or size + len(self._requests[0].queries) <= self._max_batch):
            request = self._requests.popleft()
            self.waiting -= len(request.queries)
            if not request.reply.done():
                batch.append(request)
                size += len(request.queries)
        if self.waiting < self._max_batch and not self._draining:
            self._no_more_waiting.clear()
        return batch

    # ---------------------------------------------------------------- in the owner thread

    def _load(self, load: Callable[[], S]) -> S:
        searcher = load()
        self.fingerprint = searcher.fingerprint
        return searcher

    def _call(self, function: Callable[[S], T]) -> T:
        searcher = self._searcher.result()
        try:
            return function(searcher)
        finally:
            self.fingerprint = searcher.fingerprint

    def _search_batch(self, batch: Sequence[_Request]) -> list[Answers | Exception]:
        """One outcome per request."""
        self._began = started = time.perf_counter()
        groups: dict[tuple[int, SearchOptions], list[int]] = defaultdict(list)
        for number, request in enumerate(batch):
            groups[request.k, request.options].append(number)
        outcomes: dict[int, Answers | Exception] = {}
        for (k, options), members in groups.items():
            try:
                found = self._search_group([batch[number] for number in members], k, options)
            # Whatever failed is the callers' to judge, and the others must be answered.
            except Exception as error:
                outcomes.update(dict.fromkeys(members, error))
            else:
                outcomes.update(zip(members, found, strict=True))
        self._note(sum(len(request.queries) for request in batch), time.perf_counter() - started)
        return [outcomes[number] for number in range(len(batch))]

    def _search_group(self, requests: Sequence[_Request], k: int, options: SearchOptions) -> list[Answers]:
        searcher = self._searcher.result()
        queries = [query for request in requests for query in request.queries]
        hits = iter(searcher.search(queries, k, options))
        fingerprint = searcher.fingerprint
        return [
            Answers(tuple(tuple(next(hits)) for _ in request.queries), fingerprint) for request in requests
        ]

    def _note(self, num_queries: int, seconds: float) -> None:
        self._began = None
        self._busy_s += seconds
        self._num_queries += num_queries
        self._num_batches += 1
        if num_queries:
            now = seconds / num_queries
            before = now if self._query_s is None else self._query_s
            self._query_s = _RATE_MEMORY * before + (1 - _RATE_MEMORY) * now
        if self._on_batch is not None:
            self._on_batch(num_queries, seconds)
