"""Kept and shared answers: always those of a plain search over the index as it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError, RetrieverOverloaded, RetrieverTimeout
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions
from retriever_service.service.batching import BatchingSearcher
from retriever_service.service.cache import CachingSearcher
from tests.retriever_service.fake_engine import FakeEngine

OPTIONS = [
    DEFAULT_OPTIONS,
    SearchOptions(exclude=frozenset({"a0", "a2"})),
    SearchOptions(where=Filter.parse({"legs": 2})),
]
REQUESTS = st.tuples(
    st.lists(st.sampled_from(["lion", " lion ", "the otter\tswims", "twins"]), max_size=3),
    st.integers(1, 3),
    st.sampled_from(OPTIONS),
)


class Cached:
    """A caching searcher over a fake engine, and the engine."""

    def __init__(self, *, max_answers: int = 100, **batching: Any) -> None:
        self.engine = FakeEngine()
        self.batcher = BatchingSearcher(lambda: self.engine, **batching)
        self.cache = CachingSearcher(self.batcher, max_answers=max_answers)

    async def hold(self) -> asyncio.Task[Any]:
        """A search that keeps the engine busy until the gate is opened."""
        await self.batcher.ready()
        self.engine.gate.clear()
        first = asyncio.create_task(self.batcher.search(["first"], 1))
        while not self.engine.held:
            await asyncio.sleep(0.001)
        return first


def plain(query: str, k: int, options: SearchOptions = DEFAULT_OPTIONS) -> list[list[Hit]]:
    return FakeEngine().search([query], k, options)


@given(rounds=st.lists(st.lists(REQUESTS, max_size=5), max_size=4), max_answers=st.integers(0, 4))
def test_answer_is_that_of_a_plain_search(
    rounds: list[list[tuple[list[str], int, SearchOptions]]], max_answers: int
) -> None:
    async def scenario() -> None:
        cached = Cached(max_answers=max_answers, max_batch=3)
        await cached.batcher.ready()
        for requests in rounds:
            results = await asyncio.gather(*(cached.cache.search(*request) for request in requests))
            assert results == [FakeEngine().search(*request) for request in requests]

    asyncio.run(scenario())


def test_equal_question_is_answered_from_the_cache() -> None:
    async def scenario() -> Cached:
        cached = Cached()
        await cached.batcher.ready()
        for spelling in ("caf\u00e9 lion", " cafe\u0301  lion\n"):
            assert await cached.cache.search([spelling], 2) == plain("caf\u00e9 lion", 2)
        return cached

    cached = asyncio.run(scenario())
    assert cached.engine.searches == [["caf\u00e9 lion"]]
    stats = cached.cache.stats()
    assert (stats.kept, stats.shared, stats.searched) == (1, 0, 1)


@pytest.mark.parametrize(
    "other",
    [
        ("lion", 3, DEFAULT_OPTIONS),
        ("Lion", 2, DEFAULT_OPTIONS),
        ("lion", 2, OPTIONS[1]),
        ("lion", 2, OPTIONS[2]),
        ("lion", 2, SearchOptions(method="hybrid")),
        ("lion", 2, SearchOptions(rerank=3)),
        ("lion", 2, SearchOptions(distinct=True)),
    ],
)
def test_question_that_differs_in_anything_is_searched(other: tuple[str, int, SearchOptions]) -> None:
    """Defect 6 of reference caches: known by the query alone, so that k, index and options make no difference."""

    async def scenario() -> Cached:
        cached = Cached()
        await cached.batcher.ready()
        await cached.cache.search(["lion"], 2)
        query, k, options = other
        assert await cached.cache.search([query], k, options) == plain(query, k, options)
        return cached

    assert len(asyncio.run(scenario()).engine.searches) == 2


def test_equal_questions_in_flight_are_asked_once() -> None:
    async def scenario() -> Cached:
        cached = Cached()
        first = await cached.hold()
        asking = [asyncio.create_task(cached.cache.search(["lion", "twins"], 2)) for _ in range(8)]
        asking.append(asyncio.create_task(cached.cache.search(["cliffs", "twins"], 2)))
        await asyncio.sleep(0)
        cached.engine.gate.set()
        *equal, other = await asyncio.gather(*asking)
        assert equal == [FakeEngine().search(["lion", "twins"], 2)] * 8
        assert other == FakeEngine().search(["cliffs", "twins"], 2)
        await first
        return cached

    cached = asyncio.run(scenario())
    assert cached.engine.searches == [["first"], ["lion", "twins", "cliffs"]]
    stats = cached.cache.stats()
    assert (stats.kept, stats.shared, stats.searched) == (0, 15, 3)


def test_one_caller_that_goes_does_not_take_the_answer_with_it() -> None:
    async def scenario() -> None:
        cached = Cached()
        first = await cached.hold()
        asking = [asyncio.create_task(cached.cache.search(["lion"], 2)) for _ in range(3)]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.sleep(0)
        cached.engine.gate.set()
        gone, *others = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(gone, asyncio.CancelledError)
        assert others == [plain("lion", 2)] * 2
        await first

    asyncio.run(scenario())


def test_search_that_nobody_waits_for_is_given_up_and_can_be_asked_again() -> None:
    async def scenario() -> Cached:
        cached = Cached()
        first = await cached.hold()
        asking = [asyncio.create_task(cached.cache.search(["lion"], 2)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        again = asyncio.create_task(cached.cache.search(["lion", "twins"], 2))
        await asyncio.sleep(0)
        cached.engine.gate.set()
        assert await again == FakeEngine().search(["lion", "twins"], 2)
        await first
        return cached

    assert asyncio.run(scenario()).engine.searches == [["first"], ["lion", "twins"]]


def test_each_caller_has_its_own_deadline() -> None:
    async def scenario() -> None:
        cached = Cached()
        first = await cached.hold()
        hasty = asyncio.create_task(cached.cache.search(["lion"], 2, deadline_s=0.001))
        patient = asyncio.create_task(cached.cache.search(["lion"], 2, deadline_s=30))
        with pytest.raises(RetrieverTimeout):
            await hasty
        cached.engine.gate.set()
        assert await patient == plain("lion", 2)
        await first

    asyncio.run(scenario())


def test_failure_reaches_everyone_and_is_not_kept() -> None:
    async def scenario() -> None:
        cached = Cached()
        await cached.batcher.ready()
        no_words = SearchOptions(method="bm25")
        for _ in range(2):
            asking = [cached.cache.search(["lion"], 1, no_words) for _ in range(3)]
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(result) for result in results] == [RetrieverError] * 3
        assert len(cached.engine.searches) == 2

    asyncio.run(scenario())


def test_overload_leaves_those_who_share_unharmed() -> None:
    async def scenario() -> None:
        cached = Cached(max_waiting=1)
        first = await cached.hold()
        waiting = asyncio.create_task(cached.cache.search(["lion"], 1))
        sharing = asyncio.create_task(cached.cache.search(["lion"], 1))
        refused = asyncio.create_task(cached.cache.search(["lion", "twins"], 1))
        with pytest.raises(RetrieverOverloaded):
            await refused
        cached.engine.gate.set()
        assert await asyncio.gather(waiting, sharing) == [plain("lion", 1)] * 2
        await first

    asyncio.run(scenario())


def test_update_makes_old_answers_unreachable() -> None:
    """Defect 6 of reference caches: answers of another index."""

    async def scenario() -> None:
        cached = Cached()
        await cached.batcher.ready()
        old = await cached.cache.ask(["lion"], 1)
        await cached.batcher.run(
            lambda engine: engine.add([Passage("new", "Lion", "lion lives on the savanna lion")])
        )
        await cached.batcher.run(lambda engine: engine.delete(["a0"]))
        new = await cached.cache.ask(["lion"], 1)
        assert [old.hits[0][0].passage.id, new.hits[0][0].passage.id] == ["a0", "new"]
        assert new.fingerprint != old.fingerprint

    asyncio.run(scenario())


def test_one_request_is_never_answered_from_two_states_of_the_index() -> None:
    async def scenario() -> None:
        cached = Cached()
        await cached.batcher.ready()
        await cached.cache.search(["lion"], 1)
        first = await cached.hold()
        # The deletion is made before the batch that the second query waits for; the first one is kept.
        deleting = asyncio.create_task(cached.batcher.run(lambda engine: engine.delete(["a0"])))
        asking = asyncio.create_task(cached.cache.ask(["lion", "twins"], 1))
        await asyncio.sleep(0)
        cached.engine.gate.set()
        answers = await asking
        await asyncio.gather(deleting, first)
        assert answers.fingerprint == cached.engine.fingerprint
        assert answers.lists() == cached.engine.search(["lion", "twins"], 1)

    asyncio.run(scenario())


def test_only_the_most_recently_used_answers_are_kept() -> None:
    async def scenario() -> Cached:
        cached = Cached(max_answers=2)
        await cached.batcher.ready()
        for query in ("a", "b", "a", "c", "a", "b"):
            await cached.cache.search([query], 1)
        return cached

    assert asyncio.run(scenario()).engine.searches == [["a"], ["b"], ["c"], ["b"]]


def test_what_a_caller_does_to_its_hits_changes_nothing_for_others() -> None:
    """Defect 6 of reference caches: what callers get is what is kept."""

    async def scenario() -> None:
        cached = Cached()
        await cached.batcher.ready()
        (hits,) = await cached.cache.search(["lion"], 2)
        with pytest.raises(AttributeError):
            hits[0].score = 0.0  # type: ignore[misc]
        hits[0].passage.metadata["score"] = 0.0  # type: ignore[index]
        hits.clear()
        assert await cached.cache.search(["lion"], 2) == plain("lion", 2)

    asyncio.run(scenario())


def test_index_that_is_still_loading_is_waited_for() -> None:
    async def scenario() -> None:
        cached = Cached()
        assert await cached.cache.search([" lion"], 2) == plain("lion", 2)

    asyncio.run(scenario())
