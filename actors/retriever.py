"""The dense retriever as an actor: many callers, one encoder and index, batches as they come; and its client.

Guarantees:
- requests that arrive while a batch is being searched form the next batch: no caller waits for a timer, and
  an idle retriever answers at once;
- one thread owns encoder and index (a GPU index may not even be read by two threads);
- waiting queries are bounded: beyond `max_waiting` a request fails at once with `RetrieverOverloaded`;
- the client answers with hits or raises `RetrieverUnavailable` (nothing answered) or `RetrieverError` (a bad
  request, index or encoder), each within a bounded time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from retriever_service.errors import RetrieverError, RetrieverOverloaded, RetrieverUnavailable
from retriever_service.search import CACHED_QUERIES, DenseSearcher, Hit, check_request

if TYPE_CHECKING:
    from retriever_service.encoder import EncoderSpec
    from retriever_service.index import Manifest

logger = logging.getLogger(__name__)

MAX_CONCURRENT_CALLS = 100_000


@dataclass(frozen=True, slots=True)
class RetrieverStats:
    """What a retriever did since its start."""

    queries: int
    batches: int
    busy_s: float
    """Seconds in which the owner thread was searching."""
    cache_hits: int
    """Queries that needed no encoding."""
    waiting: int
    """Queries that wait for the next batch now."""

    @property
    def mean_batch(self) -> float:
        """Queries per batch."""
        return self.queries / self.batches if self.batches else 0.0


@dataclass(slots=True, eq=False)
class _Request:
    queries: list[str]
    k: int
    reply: asyncio.Future[list[list[Hit]]]


class BatchingSearcher:
    """Turns concurrent `search` calls into batches for one searcher.

    Args:
        load: makes the searcher; called once, in the owner thread. Failures come out of `ready` and `search`.
        max_batch: most queries in one batch (a longer single request is still one batch).
        max_waiting: most queries that may wait.
    """

    def __init__(
        self, load: Callable[[], DenseSearcher], *, max_batch: int = 128, max_waiting: int = 65_536
    ) -> None:
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._owner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retriever")
        self._searcher: Future[DenseSearcher] = self._owner.submit(load)
        self._requests: deque[_Request] = deque()
        self._serving: asyncio.Task[None] | None = None
        self._num_waiting = self._num_queries = self._num_batches = 0
        self._busy_s = 0.0

    async def ready(self) -> str:
        """Wait until the searcher is loaded; its fingerprint.

        Raises:
            RetrieverError: the index or encoder is unusable.
        """
        return (await asyncio.wrap_future(self._searcher)).fingerprint

    async def info(self) -> Manifest:
        """What is being served."""
        return (await asyncio.wrap_future(self._searcher)).manifest

    async def stats(self) -> RetrieverStats:
        """Counters since the start."""
        searcher = await asyncio.wrap_future(self._searcher)
        return RetrieverStats(
            self._num_queries, self._num_batches, self._busy_s, searcher.cache_hits, self._num_waiting
        )

    async def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` passages of each query; see `DenseSearcher.search`.

        Raises:
            RetrieverError: a bad request (or see `ready`).
            RetrieverOverloaded: too many queries are waiting.
        """
        check_request(queries, k)
        if not queries:
            return []
        if self._num_waiting and self._num_waiting + len(queries) > self._max_waiting:
            raise RetrieverOverloaded(f"{self._num_waiting} queries are waiting (limit {self._max_waiting})")
        request = _Request(queries, k, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        self._num_waiting += len(queries)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await request.reply

    async def _serve(self) -> None:
        """Answer batch after batch until nobody waits."""
        # Callers that became runnable together with the first one get a turn to join its batch.
        await asyncio.sleep(0)
        while batch := self._next_batch():
            try:
                results = await asyncio.wrap_future(self._owner.submit(self._search_batch, batch))
            # Whatever failed is the callers' to judge, and the next batch must go on.
            except Exception as error:
                for request in batch:
                    if not request.reply.done():
                        request.reply.set_exception(error)
            else:
                for request, result in zip(batch, results, strict=True):
                    if not request.reply.done():
                        request.reply.set_result(result)

    def _next_batch(self) -> list[_Request]:
        """Take waiting requests in order, up to `max_batch` queries; drop those whose caller has gone."""
        batch: list[_Request] = []
        size = 0
        while self._requests and (not batch or size + len(self._requests[0].queries) <= self._max_batch):
            request = self._requests.popleft()
            self._num_waiting -= len(request.queries)
            if not request.reply.done():
                batch.append(request)
                size += len(request.queries)
        return batch

    def _search_batch(self, batch: Sequence[_Request]) -> list[list[list[Hit]]]:
        """One result per request. All at the largest k: hits are sorted, so fewer are a prefix of more."""
        started = time.perf_counter()
        queries = [query for request in batch for query in request.queries]
        hits = iter(self._searcher.result().search(queries, max(request.k for request in batch)))
        results = [[next(hits)[: request.k] for _ in request.queries] for request in batch]
        self._busy_s += time.perf_counter() - started
        self._num_queries += len(queries)
        self._num_batches += 1
        return results


@ray.remote(max_concurrency=MAX_CONCURRENT_CALLS)
class RetrieverActor(BatchingSearcher):
    """A replica of the retriever. It loads in the background; await `ready` before use.

    Args:
        index_dir: a built index, on a path that the actor's node sees; replicas on one node share its pages.
        encoder, device, num_threads, search_parameters, cached_queries: see `DenseSearcher.open`.
        max_batch, max_waiting: see `BatchingSearcher`.
    """

    def __init__(
        self,
        index_dir: str | Path,
        *,
        encoder: EncoderSpec | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        search_parameters: str = "",
        cached_queries: int = CACHED_QUERIES,
        max_batch: int = 128,
        max_waiting: int = 65_536,
    ) -> None:
        load = partial(
            DenseSearcher.open,
            index_dir,
            encoder=encoder,
            device=device,
            num_threads=num_threads,
            search_parameters=search_parameters,
            cached_queries=cached_queries,
        )
        super().__init__(load, max_batch=max_batch, max_waiting=max_waiting)


class RetrieverClient:
    """Searches over replicas in turn; a failing one is avoided for a while and its requests go to the next.

    Args:
        handles: actor handles of the replicas.
        timeout_s: deadline of one attempt, in seconds.
        max_attempts: attempts per search, over all replicas. With one replica, the pauses between them should
            outlast its restart.
        backoff_s: mean pause before the second attempt, in seconds; it doubles with each further one, and is
            drawn between half and one and a half of that so that callers do not return all at once.
        seed: of that jitter.

    A search lasts at most `max_attempts * timeout_s` and the pauses.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        *,
        timeout_s: float = 60.0,
        max_attempts: int = 4,
        backoff_s: float = 2.0,
        seed: int = 0,
    ) -> None:
        if not handles or max_attempts < 1:
            raise ValueError(f"a client needs replicas and attempts, got {len(handles)} and {max_attempts}")
        self._handles = list(handles)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self._random = random.Random(seed)
        self._turn = 0
        self._avoid_until = [0.0] * len(self._handles)

    async def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` passages, best first.

        Raises:
            RetrieverError: the request itself, the index or the encoder is at fault; not tried again.
            RetrieverUnavailable: no attempt succeeded.
        """
        failure: Exception | None = None
        for attempt in range(self._max_attempts):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.5))
            replica = self._next_replica()
            try:
                return await self._ask(replica, query, k)
            except RetrieverError:
                raise
            except (ray.exceptions.RayError, RetrieverOverloaded, TimeoutError) as error:
                failure = error
                self._avoid_until[replica] = time.monotonic() + self._timeout_s
                logger.warning(
                    f"retriever replica {replica}, attempt {attempt + 1}/{self._max_attempts}: {error!r}"
                )
        raise RetrieverUnavailable(
            f"no answer from {len(self._handles)} retriever replicas in {self._max_attempts} attempts of "
            f"{self._timeout_s} s; the last failure: {failure!r}"
        ) from failure

    async def _ask(self, replica: int, query: str, k: int) -> list[Hit]:
        reference = self._handles[replica].search.remote([query], k)
        try:
            async with asyncio.timeout(self._timeout_s):
                results: list[list[Hit]] = await reference
        except (TimeoutError, asyncio.CancelledError):
            # Nobody waits for it any more, so the replica need not search for it.
            ray.cancel(reference)
            raise
        return results[0]

    def _next_replica(self) -> int:
        """The next replica in turn that did not fail lately, or else the next in turn."""
        count = len(self._handles)
        order = [(self._turn + step) % count for step in range(count)]
        now = time.monotonic()
        chosen = next((replica for replica in order if self._avoid_until[replica] <= now), order[0])
        self._turn = (chosen + 1) % count
        return chosen
