"""Concurrent callers of one searcher: they share batches, and each gets the answer of a plain search."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.errors import (
    RetrieverError,
    RetrieverOverloaded,
    RetrieverTimeout,
    RetrieverUnavailable,
)
from retriever_service.passages.filters import Filter
from retriever_service.passages.hits import DEFAULT_OPTIONS, Hit, SearchOptions
from retriever_service.service.batching import BatchingSearcher
from tests.retriever_service.fake_engine import FakeEngine

QUERIES = ["lion", "the otter swims", "twins", "cliffs", ""]
OPTIONS = [
    DEFAULT_OPTIONS,
    SearchOptions(exclude=frozenset({"a0", "a2"})),
    SearchOptions(where=Filter.parse({"legs": 2})),
]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def batching(engine: FakeEngine, **options: Any) -> BatchingSearcher[FakeEngine]:
    return BatchingSearcher(lambda: engine, **options)


def plain(query: str, k: int, options: SearchOptions = DEFAULT_OPTIONS) -> list[list[Hit]]:
    return FakeEngine().search([query], k, options)


async def while_busy(
    batcher: BatchingSearcher[FakeEngine], engine: FakeEngine, calls: Callable[[], list[Awaitable[Any]]]
) -> list[Any]:
    """The results (or exceptions) of `calls`, all of them made while a first batch is being searched."""
    await batcher.ready()
    engine.gate.clear()
    first = asyncio.create_task(batcher.search(["first"], 1))
    while not engine.held:
        await asyncio.sleep(0.001)
    tasks = [asyncio.ensure_future(call) for call in calls()]
    await asyncio.sleep(0.01)
    engine.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    return results


def test_callers_that_arrive_during_a_batch_share_the_next(engine: FakeEngine) -> None:
    """Defect 4 of reference servers: a pool of threads over one index; here one thread, and batches."""

    async def scenario() -> Any:
        batcher = batching(engine)
        results = await while_busy(
            batcher, engine, lambda: [batcher.search([f"lion {i}"], 2) for i in range(10)]
        )
        return results, await batcher.stats()

    results, stats = asyncio.run(scenario())
    assert results == [plain(f"lion {i}", 2) for i in range(10)]
    assert engine.searches == [["first"], [f"lion {i}" for i in range(10)]]
    assert (stats.queries, stats.batches, stats.mean_batch, stats.waiting) == (11, 2, 5.5, 0)
    assert len(engine.threads) == 1


def test_a_batch_that_hangs_is_seen_in_the_counters(engine: FakeEngine) -> None:
    async def scenario() -> tuple[float, float, float]:
        batcher = batching(engine)
        idle = await batcher.stats()
        (during,) = await while_busy(batcher, engine, lambda: [batcher.stats()])
        return idle.in_hand_s, during.in_hand_s, (await batcher.stats()).in_hand_s

    idle, during, afterwards = asyncio.run(scenario())
    assert (idle, afterwards) == (0.0, 0.0)
    assert during > 0.0


def test_callers_that_arrive_together_share_the_first_batch(engine: FakeEngine) -> None:
    async def scenario() -> None:
        batcher = batching(engine)
        await asyncio.gather(*(batcher.search([f"q{i}"], 1) for i in range(5)))

    asyncio.run(scenario())
    assert len(engine.searches) == 1


def test_batches_are_bounded_but_a_long_request_stays_whole(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine, max_batch=3)
        requests = [["a", "b"], ["c"], ["d", "e", "f", "g"], ["h"]]
        return await while_busy(batcher, engine, lambda: [batcher.search(request, 1) for request in requests])

    results = asyncio.run(scenario())
    assert [len(result) for result in results] == [2, 1, 4, 1]
    assert engine.searches[1:] == [["a", "b", "c"], ["d", "e", "f", "g"], ["h"]]


@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.sampled_from(QUERIES), max_size=3), st.integers(1, 4), st.sampled_from(OPTIONS)
        ),
        max_size=8,
    ),
    max_batch=st.integers(1, 5),
)
def test_batched_answer_is_that_of_a_plain_search(
    requests: list[tuple[list[str], int, SearchOptions]], max_batch: int
) -> None:
    engine = FakeEngine()

    async def scenario() -> Any:
        batcher = batching(engine, max_batch=max_batch)
        return await while_busy(
            batcher, engine, lambda: [batcher.search(queries, k, options) for queries, k, options in requests]
        )

    assert asyncio.run(scenario()) == [FakeEngine().search(*request) for request in requests]


def test_bad_request_fails_alone(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)
        no_words = SearchOptions(method="bm25")
        calls = [
            batcher.search(["lion"], 1),
            batcher.search(["\ud800"], 1),
            batcher.search(["lion"], 0),
            batcher.search(["lion"], 1, no_words),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, *bad = asyncio.run(scenario())
    assert good == plain("lion", 1)
    assert [type(error) for error in bad] == [RetrieverError] * 3


def test_failed_batch_is_reported_and_the_next_one_answered(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)
        with pytest.raises(MemoryError, match="too much"):
            await batcher.search(["poison"], 1)
        return await batcher.search(["lion"], 1)

    assert asyncio.run(scenario()) == plain("lion", 1)


def test_a_fault_around_a_batch_is_told_to_its_callers_and_the_next_one_answered(engine: FakeEngine) -> None:
    faults = [ZeroDivisionError("a counter")]

    def on_batch(queries: int, seconds: float) -> None:
        if faults:
            raise faults.pop()

    async def scenario() -> Any:
        batcher = batching(engine, on_batch=on_batch)
        with pytest.raises(ZeroDivisionError):
            await batcher.search(["lion"], 1, deadline_s=60)
        return await batcher.search(["lion"], 1, deadline_s=60)

    assert asyncio.run(scenario()) == plain("lion", 1)


def test_caller_that_has_gone_is_not_searched_for(engine: FakeEngine) -> None:
    async def scenario() -> None:
        batcher = batching(engine)

        def calls() -> list[Awaitable[Any]]:
            gone = asyncio.create_task(batcher.search(["gone"], 1))
            asyncio.get_running_loop().call_soon(gone.cancel)
            return [gone, batcher.search(["here"], 1)]

        await while_busy(batcher, engine, calls)

    asyncio.run(scenario())
    assert engine.searches == [["first"], ["here"]]


def test_request_past_its_deadline_fails_and_is_not_searched_for(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)
        return await while_busy(
            batcher,
            engine,
            lambda: [
                batcher.search(["late"], 1, deadline_s=0.001),
                batcher.search(["lion"], 1, deadline_s=30),
            ],
        )

    late, in_time = asyncio.run(scenario())
    assert isinstance(late, RetrieverTimeout)
    assert in_time == plain("lion", 1)
    assert engine.searches == [["first"], ["lion"]]


def test_waiting_queries_are_bounded(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine, max_waiting=2)
        # So that it knows how long a query takes.
        await batcher.search(["slow"], 1)
        return await while_busy(batcher, engine, lambda: [batcher.search(["lion"], 1) for _ in range(3)])

    *answered, refused = asyncio.run(scenario())
    assert answered == [plain("lion", 1)] * 2
    assert isinstance(refused, RetrieverOverloaded)
    assert refused.retry_after_s > 0.5


def test_overload_keeps_its_estimate_between_processes() -> None:
    error: RetrieverOverloaded = pickle.loads(pickle.dumps(RetrieverOverloaded("busy", retry_after_s=7.0)))
    assert (str(error), error.retry_after_s) == ("busy", 7.0)


def test_failure_to_load_reaches_ready_and_every_search() -> None:
    def load() -> FakeEngine:
        raise RetrieverError("the index is cut short")

    async def scenario() -> None:
        batcher = BatchingSearcher(load)
        with pytest.raises(RetrieverError, match="cut short"):
            await batcher.ready()
        with pytest.raises(RetrieverError, match="cut short"):
            await batcher.search(["q"], 1)

    asyncio.run(scenario())


def test_update_runs_in_the_owner_thread_between_batches(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)
        before = await batcher.ready()

        def calls() -> list[Awaitable[Any]]:
            return [batcher.run(lambda it: it.delete(["a0"])), batcher.ask(["lion"], 1)]

        count, answers = await while_busy(batcher, engine, calls)
        return before, count, answers, batcher.fingerprint

    before, count, answers, after = asyncio.run(scenario())
    assert count == 5
    assert answers.hits[0][0].passage.id != "a0"
    assert answers.fingerprint == after != before


def test_failed_update_is_reported_and_searching_goes_on(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)
        with pytest.raises(RetrieverError, match="no passage 'nowhere'"):
            await batcher.run(lambda it: it.delete(["nowhere"]))
        return await batcher.search(["lion"], 1)

    assert asyncio.run(scenario()) == plain("lion", 1)


def test_an_idle_searcher_that_is_to_wait_gathers_what_comes_one_after_the_other(engine: FakeEngine) -> None:
    async def callers() -> None:
        batcher = batching(engine, wait_s=0.5)
        await batcher.ready()
        searches = []
        for query in QUERIES:
            searches.append(asyncio.create_task(batcher.search([query], 1)))
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*searches) == [plain(query, 1) for query in QUERIES]

    asyncio.run(callers())
    assert engine.searches == [QUERIES]


@pytest.mark.parametrize("wait_s", [0.2, 3600.0])
def test_a_full_batch_waits_for_nobody_and_the_last_one_not_for_ever(
    engine: FakeEngine, wait_s: float
) -> None:
    async def callers() -> None:
        batcher = batching(engine, max_batch=2, wait_s=wait_s)
        await batcher.ready()
        searches = [asyncio.create_task(batcher.search([query], 1)) for query in QUERIES]
        await asyncio.wait(searches[:4], timeout=30)
        assert [search.done() for search in searches] == [True] * 4 + [False]
        if wait_s > 1:
            assert await batcher.drain(grace_s=30)
        assert await searches[4] == plain(QUERIES[4], 1)

    asyncio.run(callers())
    assert engine.searches == [QUERIES[:2], QUERIES[2:4], QUERIES[4:]]


def test_drain_answers_who_waits_and_refuses_who_comes(engine: FakeEngine) -> None:
    async def scenario() -> Any:
        batcher = batching(engine)

        async def drain() -> bool:
            return await batcher.drain(grace_s=30)

        async def come_later() -> None:
            await asyncio.sleep(0)
            with pytest.raises(RetrieverUnavailable, match="shut down"):
                await batcher.search(["late"], 1)
            with pytest.raises(RetrieverUnavailable, match="shut down"):
                await batcher.run(lambda it: it.delete(["a0"]))

        return await while_busy(batcher, engine, lambda: [batcher.search(["lion"], 1), drain(), come_later()])

    assert asyncio.run(scenario()) == [plain("lion", 1), True, None]


def test_drain_gives_up_after_its_grace_period(engine: FakeEngine) -> None:
    async def scenario() -> None:
        batcher = batching(engine)
        await batcher.ready()
        engine.gate.clear()
        held = [asyncio.create_task(batcher.search([query], 1)) for query in ("lion", "otter")]
        await asyncio.sleep(0)
        assert not await batcher.drain(grace_s=0.01)
        for result in await asyncio.gather(*held, return_exceptions=True):
            assert isinstance(result, RetrieverUnavailable)
        engine.gate.set()

    asyncio.run(scenario())
