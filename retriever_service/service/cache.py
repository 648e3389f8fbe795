"""Answers that are kept, and equal questions that are asked once.

Agents that sample the same question many times send the same query many times, and often at the same moment.

Guarantees:
- an answer is that of a plain search for the same query, k and options over the index as it is: what is kept is
  known by all of them and by the searcher's fingerprint, so an update makes it unreachable;
- while a query is being searched for, equal ones wait for the same result; the search is given up only when
  the last of them has gone, and each waits no longer than its own deadline;
- failures reach everyone who waits for them and are not kept;
- nothing that is kept can be written to: hits are immutable, and callers of `search` get lists and metadata of their
  own (those of `ask` share the metadata, and must leave it alone);
- all hits of one request come from one state of the index.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retriever_service.errors import RetrieverTimeout
from retriever_service.passages.hits import (
    DEFAULT_OPTIONS,
    Hit,
    SearchOptions,
    check_request,
    normalise_query,
)
from retriever_service.service.batching import Answers, BatchingSearcher

Key = tuple[str, int, SearchOptions, str]
"""(normalised query, k, options, fingerprint): everything that the hits depend on."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Queries since the start, by where their answer came from."""

    kept: int
    """It was there."""
    shared: int
    """It was being searched for already."""
    searched: int


@dataclass(slots=True, eq=False)
class _Flight:
    """Queries that are being searched for, and how many callers wait for them."""

    keys: Sequence[Key]
    reply: asyncio.Future[Answers]
    passengers: int = 0


class CachingSearcher:
    """Stands in front of a `BatchingSearcher`, with the same `ask` and `search`. Belongs to the same event loop.

    Args:
        max_answers: answers (of one query each) that are kept, the most recently used ones; 0 keeps none.
    """

    def __init__(self, batcher: BatchingSearcher[Any], *, max_answers: int) -> None:
        self._batcher = batcher
        self._max_answers = max_answers
        self._kept: OrderedDict[Key, tuple[Hit, ...]] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}
        self._num_kept = self._num_shared = self._num_searched = 0

    def stats(self) -> CacheStats:
        """Counters since the start."""
        return CacheStats(self._num_kept, self._num_shared, self._num_searched)

    async def search(
        self,
        queries: Sequence[str],
        k: int,
        options: SearchOptions = DEFAULT_OPTIONS,
        deadline_s: float | None = None,
    ) -> list[list[Hit]]:
        """The best `k` passages of each query; as `ask`, without the fingerprint."""
        answers = await self.ask(queries, k, options, deadline_s)
        return [[_own(hit) for hit in hits] for hits in answers.hits]

    async def ask(
        self,
        queries: Sequence[str],
        k: int,
        options: SearchOptions = DEFAULT_OPTIONS,
        deadline_s: float | None = None,
    ) -> Answers:
        """The best `k` passages of each query.

        Raises:
            As `BatchingSearcher.ask`.
        """
        check_request(queries, k)
        loop = asyncio.get_running_loop()
        started = loop.time()
        fingerprint = self._batcher.fingerprint
        if fingerprint is None:
            # Still being loaded: there is no key yet, and nothing that could be kept.
            return await self._batcher.ask(
                [normalise_query(query) for query in queries], k, options, deadline_s
            )
        keys = [(normalise_query(query), k, options, fingerprint) for query in queries]
        found: dict[Key, tuple[Hit, ...]] = {}
        flights: list[_Flight] = []
        try:
            self._look_up(keys, found, flights)
            if flights:
                await asyncio.wait([flight.reply for flight in flights], timeout=deadline_s)
            for flight in flights:
                if not flight.reply.done():
                    raise RetrieverTimeout(f"no answer within {deadline_s} s")
                answers = flight.reply.result()
                if answers.fingerprint != fingerprint:
                    # The index was updated on the way: everything once more, from its new state.
                    left_s = None if deadline_s is None else max(0.0, started + deadline_s - loop.time())
                    return await self._batcher.ask([key[0] for key in keys], k, options, left_s)
                found.update(zip(flight.keys, answers.hits, strict=True))
        finally:
            for flight in flights:
                self._leave(flight)
        return Answers(tuple(found[key] for key in keys), fingerprint)

    def _look_up(
        self, keys: Sequence[Key], found: dict[Key, tuple[Hit, ...]], flights: list[_Flight]
    ) -> None:
        """Fill `found` with what is kept, and `flights` with those that bring the rest, boarded."""
        missing: list[Key] = []
        for key in dict.fromkeys(keys):
            if (hits := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                found[key] = hits
                self._num_kept += 1
            elif (flight := self._flights.get(key)) is not None:
                self._num_shared += 1
                if flight not in flights:
                    self._board(flight, flights)
            else:
                missing.append(key)
        if missing:
            _, k, options, _ = missing[0]
            flight = _Flight(missing, self._batcher.submit([key[0] for key in missing], k, options))
            self._num_searched += len(missing)
            self._flights.update(dict.fromkeys(missing, flight))
            flight.reply.add_done_callback(lambda reply: self._land(flight))
            self._board(flight, flights)

    def _board(self, flight: _Flight, flights: list[_Flight]) -> None:
        flight.passengers += 1
        flights.append(flight)

    def _leave(self, flight: _Flight) -> None:
        flight.passengers -= 1
        if flight.passengers == 0 and flight.reply.cancel():
            self._forget(flight)

    def _land(self, flight: _Flight) -> None:
        self._forget(flight)
        if flight.reply.cancelled() or flight.reply.exception() is not None:
            return
        answers = flight.reply.result()
        for (query, k, options, _), hits in zip(flight.keys, answers.hits, strict=True):
            self._kept[query, k, options, answers.fingerprint] = hits
        while len(self._kept) > self._max_answers:
            self._kept.popitem(last=False)

    def _forget(self, flight: _Flight) -> None:
        """Nobody can board it any more."""
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]


def _own(hit: Hit) -> Hit:
    """The hit with metadata that nobody else has."""
    if not hit.passage.metadata:
        return hit
    passage = dataclasses.replace(hit.passage, metadata=copy.deepcopy(hit.passage.metadata))
    return dataclasses.replace(hit, passage=passage)
