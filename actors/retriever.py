"""The retriever as an actor: many callers, one search engine, batches as they come; and the client of a run, for such
actors or for HTTP servers.

Guarantees:
- those of `batching.BatchingSearcher`;
- the client answers with hits or raises `RetrieverUnavailable` (nothing answered) or `RetrieverError` (a bad
  request, index or encoder, or an answer that makes no sense), each within a bounded time, whatever kind of replicas
  it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
import ray.exceptions

from actors import metrics
from actors.actor_log import Identity, introduce
from actors.homes import gpus_here, threads_of_replica
from pipeline.core.agents.program import Retrieve
from pipeline.core.config import RetrieverConfig
from pipeline.core.noise import depth_with_noise, with_noise
from retriever_service.backoff import Backoff
from retriever_service.errors import RetrieverError, RetrieverOverloaded, RetrieverUnavailable
from retriever_service.index.local_copy import LocalCopy
from retriever_service.index.read_ahead import read_ahead
from retriever_service.machine import available_cores
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions, check_request
from retriever_service.search.engine import CACHED_QUERIES, SearchEngine
from retriever_service.service.batching import BatchingSearcher
from retriever_service.service.client import RetrieverHttpClient
from retriever_service.service.limits import Limits

if TYPE_CHECKING:
    from pipeline.core.retrieval import Searched
    from retriever_service.encoding.encoder import EncoderSpec

logger = logging.getLogger(__name__)

MAX_CONCURRENT_CALLS = 100_000
MAX_QUERY_CHARS = Limits().max_query_chars


@dataclass(frozen=True, slots=True)
class Health:
    """Which process a replica is, and for how many seconds it has searched for one and the same batch."""

    process: str
    in_hand_s: float


@ray.remote(max_concurrency=MAX_CONCURRENT_CALLS)
class RetrieverActor(BatchingSearcher[SearchEngine]):
    """A replica of the retriever. It loads, and reads the index ahead, in the background; await `ready` before use.

    Args:
        index_dir: a built index, on a path that the actor's node sees; replicas on one node share its pages.
        encoder, device, search_parameters, cached_queries: see `SearchEngine.open`.
        num_threads: the same; None for the replica's share of its node's cores.
        sharers: replicas, this one included, and engines that share the CPUs of its node.
        local_copy: folder of this node, where the index is copied to and opened; None opens it where it is.
        max_batch, max_waiting, wait_s: see `BatchingSearcher`.
        identity: under which it logs and counts.
    """

    def __init__(
        self,
        index_dir: str | Path,
        *,
        encoder: EncoderSpec | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        sharers: int = 1,
        local_copy: str | None = None,
        search_parameters: str = "",
        cached_queries: int = CACHED_QUERIES,
        max_batch: int = 128,
        max_waiting: int = 65_536,
        wait_s: float = 0.0,
        identity: Identity | None = None,
    ) -> None:
        introduce(identity)
        self._process = uuid.uuid4().hex
        self._copy: LocalCopy | None = None
        """Held as long as this process lives, so that nobody removes it."""
        # Also beside a GPU: Ray has told OpenMP to use one, as the actor reserves none.
        threads = num_threads or threads_of_replica(available_cores(), sharers, gpus_here())
        logger.info(f"searches with {threads} threads")
        load = partial(
            self._open,
            index_dir,
            local_copy,
            encoder=encoder,
            device=device,
            num_threads=threads,
            search_parameters=search_parameters,
            cached_queries=cached_queries,
        )
        super().__init__(
            load, max_batch=max_batch, max_waiting=max_waiting, wait_s=wait_s, on_batch=self._note_batch
        )

    async def info(self) -> dict[str, Any]:
        """What is being served."""
        return await self.run(lambda engine: engine.info())

    async def health(self) -> Health:
        """Answers as long as this process does, whatever its owner thread is busy with."""
        return Health(self._process, (await self.stats()).in_hand_s)

    def _open(self, index_dir: str | Path, local_copy: str | None, **options: Any) -> SearchEngine:
        """An engine that answers its first batch as fast as later ones."""
        began = time.perf_counter()
        if local_copy is not None:
            self._copy = copied(index_dir, local_copy)
            index_dir = self._copy.directory
        engine = SearchEngine.open(index_dir, **options)
        read_ahead(index_dir)
        engine.first_search()
        logger.info(f"opened {index_dir} in {time.perf_counter() - began:.1f} s: {engine.fingerprint}")
        return engine

    def _note_batch(self, num_queries: int, seconds: float) -> None:
        metrics.QUERIES.add(num_queries)
        metrics.QUEUE.set(self.waiting)
        metrics.BATCH_QUERIES.observe(num_queries)
        metrics.BATCH_SECONDS.observe(seconds)


def copied(index_dir: str | Path, folder: str) -> LocalCopy:
    """The index on a disk of this node (`retriever.local_copy`).

    Raises:
        RetrieverError: it cannot be copied.
    """
    try:
        return LocalCopy(index_dir, folder)
    except RetrieverError as error:
        raise RetrieverError(f"retriever.local_copy: {error}") from error


class Replica(Protocol):
    """One place that answers searches. It can be pickled: rollout workers get it."""

    async def search(self, query: str, k: int) -> list[Hit]:
        """One attempt. A caller that is cancelled leaves no work behind.

        Raises:
            RetrieverError: it would fail again.
            RetrieverUnavailable, RetrieverOverloaded, TimeoutError, RayError: it might not.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Search:
    query: str
    k: int
    hits: asyncio.Future[list[Hit]]


class ActorReplica:
    """A `RetrieverActor`. What is asked for while a call is under way goes together in the next one."""

    def __init__(self, handle: Any, options: SearchOptions = DEFAULT_OPTIONS) -> None:
        self._handle, self._options = handle, options
        self._waiting: list[_Search] = []
        self._calling: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorReplica, (self._handle, self._options)

    async def search(self, query: str, k: int) -> list[Hit]:
        check_request([query], k)  # it must not fail those that go with it
        search = _Search(query, k, asyncio.get_running_loop().create_future())
        self._waiting.append(search)
        if self._calling is None or self._calling.done():
            self._calling = asyncio.create_task(self._call_while_searches_wait())
        return await search.hits

    async def _call_while_searches_wait(self) -> None:
        await asyncio.sleep(0)  # callers that became runnable together
        while self._waiting:
            k = self._waiting[0].k
            searches = [search for search in self._waiting if search.k == k and not search.hits.done()]
            self._waiting = [search for search in self._waiting if search.k != k]
            if searches:
                await self._answer(searches, k)

    async def _answer(self, searches: Sequence[_Search], k: int) -> None:
        """One call. It ends early when none of its callers waits any more."""
        call = asyncio.create_task(self._hits([search.query for search in searches], k))
        callers = asyncio.create_task(_all_done([search.hits for search in searches]))
        await asyncio.wait([call, callers], return_when=asyncio.FIRST_COMPLETED)
        callers.cancel()
        if not call.done():
            call.cancel()
            return
        failure = call.exception()
        for number, search in enumerate(searches):
            if search.hits.done():
                continue
            if failure is not None:
                search.hits.set_exception(failure)
            else:
                search.hits.set_result(call.result()[number])

    async def _hits(self, queries: list[str], k: int) -> list[list[Hit]]:
        reference = self._handle.search.remote(queries, k, self._options)
        try:
            results: list[list[Hit]] = await reference
        except asyncio.CancelledError:
            # Nobody waits for it any more, so the replica need not search for it.
            ray.cancel(reference)
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RetrieverError):
                raise error.cause from error  # without the traceback that Ray puts in front
            raise
        return results


async def _all_done(futures: Sequence[asyncio.Future[Any]]) -> None:
    await asyncio.wait(futures)


class HttpReplica:
    """A server, by a client that makes one attempt per search."""

    def __init__(self, client: RetrieverHttpClient, options: SearchOptions = DEFAULT_OPTIONS) -> None:
        self._client, self._options = client, options

    async def search(self, query: str, k: int) -> list[Hit]:
        # A turn that degenerates can be longer than servers accept; no encoder reads as far.
        (hits,) = await self._client.asearch([query[:MAX_QUERY_CHARS]], k, self._options)
        return hits


class RetrieverClient:
    """Searches over replicas in turn; a failing one is avoided for a while and its requests go to the next.

    Args:
        timeout_s: deadline of one attempt, in seconds.
        max_attempts: attempts per search, over all replicas. With one replica, the pauses between them should
            outlast its restart.
        backoff_s: mean pause before the second attempt, in seconds; it doubles with each further one, and is
            drawn between half and one and a half of that so that callers do not return all at once.
        seed: of that jitter.
        noise: see `with_noise`.

    A search lasts at most `max_attempts * timeout_s` and the pauses.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        timeout_s: float = 60.0,
        max_attempts: int = 4,
        backoff_s: float = 2.0,
        seed: int = 0,
        noise: float = 0.0,
    ) -> None:
        if not replicas or max_attempts < 1:
            raise ValueError(f"a client needs replicas and attempts, got {len(replicas)} and {max_attempts}")
        self._replicas = list(replicas)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._backoff = Backoff(backoff_s, seed)
        self._noise = noise
        self._turn = 0
        self._avoid_until = [0.0] * len(self._replicas)

    async def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` passages, best first.

        Raises:
            RetrieverError: the request itself, the index or the encoder is at fault, or the answer makes no sense; not
                tried again.
            RetrieverUnavailable: no attempt succeeded.
        """
        return with_noise(await self._best(query, depth_with_noise(k, self._noise)), query, k, self._noise)

    async def _best(self, query: str, k: int) -> list[Hit]:
        failure: Exception | None = None
        for attempt in range(self._max_attempts):
            await asyncio.sleep(self._backoff.pause_s(attempt))
            replica = self._next_replica()
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._replicas[replica].search(query, k)
            except RetrieverError:
                raise
            except (
                ray.exceptions.RayError,
                RetrieverOverloaded,
                RetrieverUnavailable,
                TimeoutError,
            ) as error:
                failure = error
                self._avoid_until[replica] = time.monotonic() + self._timeout_s
                logger.warning(
                    f"retriever replica {replica}, attempt {attempt + 1}/{self._max_attempts}: {error!r}"
                )
        raise RetrieverUnavailable(
            f"no answer from {len(self._replicas)} retriever replicas in {self._max_attempts} attempts of "
            f"{self._timeout_s} s; the last failure: {failure!r}"
        ) from failure

    def _next_replica(self) -> int:
        """The next replica in turn that did not fail lately, or else the next in turn."""
        count = len(self._replicas)
        order = [(self._turn + step) % count for step in range(count)]
        now = time.monotonic()
        chosen = next((replica for replica in order if self._avoid_until[replica] <= now), order[0])
        self._turn = (chosen + 1) % count
        return chosen


def http_replicas(clients: Sequence[RetrieverHttpClient], config: RetrieverConfig) -> list[Replica]:
    """The servers of a run."""
    return [HttpReplica(client, config.options) for client in clients]


def client_of(replicas: Sequence[Replica], config: RetrieverConfig) -> RetrieverClient:
    """The client of a run."""
    return RetrieverClient(
        replicas, timeout_s=config.timeout_s, max_attempts=config.max_attempts, noise=config.noise
    )


def open_retriever(searched: Searched, config: RetrieverConfig) -> Retrieve:
    """A retriever without Ray: the servers, or the index opened in this process.

    Raises:
        RetrieverError: no such index, or search parameters that do not fit.
    """
    if not isinstance(searched, Path):
        return client_of(http_replicas(searched.clients, config), config).search
    engine = SearchEngine.open(searched, search_parameters=config.search_parameters)

    async def retrieve(query: str, k: int) -> list[Hit]:
        (hits,) = engine.search([query], depth_with_noise(k, config.noise), config.options)
        return with_noise(hits, query, k, config.noise)

    return retrieve
