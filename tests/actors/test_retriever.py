"""Batching, failover and errors of the retriever, without Ray where it can be; one test with a real actor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions

from actors.retriever import BatchingSearcher, RetrieverActor, RetrieverClient
from retriever_service.corpus import Passage
from retriever_service.encoder import EncoderSpec
from retriever_service.errors import RetrieverError, RetrieverOverloaded, RetrieverUnavailable
from retriever_service.index import build_index
from retriever_service.search import Hit
from tests.retriever_service.support import write_animals


def hits_for(query: str, k: int) -> list[Hit]:
    return [Hit(Passage(f"{query}-{rank}", "", query), 1.0 / (rank + 1)) for rank in range(k)]


class FakeSearcher:
    """Records batches and holds each one until `gate` is open."""

    fingerprint = "f"
    cache_hits = 0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        assert self.gate.wait(timeout=30), "the test never opened the gate"
        self.batches.append(list(queries))
        self.threads.add(threading.current_thread().name)
        if "poison" in queries:
            raise MemoryError("too much")
        return [hits_for(query, k) for query in queries]


@pytest.fixture
def searcher() -> FakeSearcher:
    return FakeSearcher()


def batching(searcher: FakeSearcher, **options: Any) -> BatchingSearcher:
    load: Any = lambda: searcher  # noqa: E731
    return BatchingSearcher(load, **options)


async def gather_while_busy(
    batcher: BatchingSearcher, searcher: FakeSearcher, calls: Callable[[], list[Awaitable[Any]]]
) -> list[Any]:
    """The results (or exceptions) of `calls`, all of them made while a first batch is being searched."""
    searcher.gate.clear()
    first = asyncio.create_task(batcher.search(["first"], 1))
    await asyncio.sleep(0.05)
    tasks = [asyncio.ensure_future(call) for call in calls()]
    await asyncio.sleep(0)
    searcher.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    return results


def test_callers_that_arrive_during_a_batch_share_the_next(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher)
        results = await gather_while_busy(
            batcher, searcher, lambda: [batcher.search([f"q{i}"], 2) for i in range(10)]
        )
        return results, await batcher.stats()

    results, stats = asyncio.run(scenario())
    assert results == [[hits_for(f"q{i}", 2)] for i in range(10)]
    assert searcher.batches == [["first"], [f"q{i}" for i in range(10)]]
    assert (stats.queries, stats.batches, stats.mean_batch, stats.waiting) == (11, 2, 5.5, 0)
    assert len(searcher.threads) == 1


def test_callers_that_arrive_together_share_the_first_batch(searcher: FakeSearcher) -> None:
    async def scenario() -> None:
        batcher = batching(searcher)
        await asyncio.gather(*(batcher.search([f"q{i}"], 1) for i in range(5)))

    asyncio.run(scenario())
    assert len(searcher.batches) == 1


def test_batches_are_bounded_but_a_long_request_stays_whole(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher, max_batch=3)
        requests = [["a", "b"], ["c"], ["d", "e", "f", "g"], ["h"]]
        return await gather_while_busy(
            batcher, searcher, lambda: [batcher.search(request, 1) for request in requests]
        )

    results = asyncio.run(scenario())
    assert [len(result) for result in results] == [2, 1, 4, 1]
    assert searcher.batches[1:] == [["a", "b", "c"], ["d", "e", "f", "g"], ["h"]]


def test_each_caller_gets_its_own_k(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher)
        return await asyncio.gather(*(batcher.search(["q"], k) for k in (1, 4, 2)))

    assert asyncio.run(scenario()) == [[hits_for("q", k)] for k in (1, 4, 2)]


def test_bad_request_fails_alone(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher)
        calls = [batcher.search(["good"], 1), batcher.search(["\ud800"], 1), batcher.search(["good"], 0)]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, *bad = asyncio.run(scenario())
    assert good == [hits_for("good", 1)]
    assert [type(error) for error in bad] == [RetrieverError, RetrieverError]


def test_failed_batch_is_reported_and_the_next_one_answered(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher)
        with pytest.raises(MemoryError, match="too much"):
            await batcher.search(["poison"], 1)
        return await batcher.search(["good"], 1)

    assert asyncio.run(scenario()) == [hits_for("good", 1)]


def test_caller_that_has_gone_is_not_searched_for(searcher: FakeSearcher) -> None:
    async def scenario() -> None:
        batcher = batching(searcher)

        def calls() -> list[Awaitable[Any]]:
            gone = asyncio.create_task(batcher.search(["gone"], 1))
            asyncio.get_running_loop().call_soon(gone.cancel)
            return [gone, batcher.search(["here"], 1)]

        await gather_while_busy(batcher, searcher, calls)

    asyncio.run(scenario())
    assert searcher.batches == [["first"], ["here"]]


def test_waiting_queries_are_bounded(searcher: FakeSearcher) -> None:
    async def scenario() -> Any:
        batcher = batching(searcher, max_waiting=2)
        return await gather_while_busy(
            batcher, searcher, lambda: [batcher.search([f"q{i}"], 1) for i in range(3)]
        )

    *answered, refused = asyncio.run(scenario())
    assert answered == [[hits_for("q0", 1)], [hits_for("q1", 1)]]
    assert isinstance(refused, RetrieverOverloaded)


def test_failure_to_load_reaches_ready_and_every_search() -> None:
    def load() -> Any:
        raise RetrieverError("the index is cut short")

    async def scenario() -> None:
        batcher = BatchingSearcher(load)
        with pytest.raises(RetrieverError, match="cut short"):
            await batcher.ready()
        with pytest.raises(RetrieverError, match="cut short"):
            await batcher.search(["q"], 1)

    asyncio.run(scenario())


class FakeReplica:
    """An actor handle whose searches end as `script` says: an exception, "hang", then hits."""

    def __init__(self, *script: Exception | str) -> None:
        self.calls = 0
        self._script = list(script)
        self.search = SimpleNamespace(remote=self._search)

    async def _search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.calls += 1
        action = self._script.pop(0) if self._script else None
        if isinstance(action, Exception):
            raise action
        if action == "hang":
            await asyncio.sleep(30)
        return [hits_for(query, k) for query in queries]


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    references: list[Any] = []
    monkeypatch.setattr(ray, "cancel", references.append)
    return references


def client(*replicas: FakeReplica, timeout_s: float = 30.0, max_attempts: int = 4) -> RetrieverClient:
    return RetrieverClient(replicas, timeout_s=timeout_s, max_attempts=max_attempts, backoff_s=0.001)


DEAD = ray.exceptions.ActorDiedError()


def test_client_spreads_searches_over_replicas() -> None:
    replicas = [FakeReplica() for _ in range(3)]

    async def scenario() -> None:
        searching = client(*replicas)
        for _ in range(6):
            assert await searching.search("q", 2) == hits_for("q", 2)

    asyncio.run(scenario())
    assert [replica.calls for replica in replicas] == [2, 2, 2]


def test_dead_replica_is_failed_over_and_then_avoided() -> None:
    dead, alive = FakeReplica(*[DEAD] * 9), FakeReplica()

    async def scenario() -> None:
        searching = client(dead, alive)
        for _ in range(5):
            assert await searching.search("q", 1) == hits_for("q", 1)

    asyncio.run(scenario())
    assert (dead.calls, alive.calls) == (1, 5)


def test_only_replica_is_tried_again() -> None:
    replica = FakeReplica(DEAD, RetrieverOverloaded("busy"))
    assert asyncio.run(client(replica).search("q", 1)) == hits_for("q", 1)
    assert replica.calls == 3


def test_hanging_replica_is_given_up_at_the_deadline(cancelled: list[Any]) -> None:
    hanging, alive = FakeReplica("hang"), FakeReplica()
    assert asyncio.run(client(hanging, alive, timeout_s=0.05).search("q", 1)) == hits_for("q", 1)
    assert len(cancelled) == 1


def test_last_failure_is_typed_and_named() -> None:
    replica = FakeReplica(*[DEAD] * 9)
    with pytest.raises(RetrieverUnavailable, match=r"3 attempts .*ActorDiedError"):
        asyncio.run(client(replica, max_attempts=3).search("q", 1))
    assert replica.calls == 3


def test_bad_request_is_not_tried_again() -> None:
    replica = FakeReplica(RetrieverError("k must be at least 1"))
    with pytest.raises(RetrieverError, match="k must be"):
        asyncio.run(client(replica).search("q", 0))
    assert replica.calls == 1


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.component
def test_actors_answer_many_callers_and_survive_the_loss_of_one(local_ray: None, tmp_path: Path) -> None:
    build_index([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", EncoderSpec())
    start = RetrieverActor.options(num_cpus=0).remote
    replicas = [start(tmp_path / "index", num_threads=1) for _ in range(2)]
    broken = start(tmp_path / "nowhere")
    assert len(set(ray.get([replica.ready.remote() for replica in replicas], timeout=300))) == 1
    with pytest.raises(RetrieverError, match="not a built index"):
        ray.get(broken.ready.remote(), timeout=300)

    questions = [
        "Which animal swims in rivers?",
        "Which animal nests on cliffs?",
        "Who lives on the savanna?",
    ]
    searching = RetrieverClient(replicas, timeout_s=120, backoff_s=0.01)

    async def ask_all() -> list[str]:
        answers = await asyncio.gather(*(searching.search(question, 2) for question in questions * 8))
        assert all(len(hits) == 2 for hits in answers)
        return [hits[0].passage.title for hits in answers]

    assert asyncio.run(ask_all()) == ["Otter", "Eagle", "Lion"] * 8
    stats = ray.get([replica.stats.remote() for replica in replicas], timeout=60)
    assert sum(entry.queries for entry in stats) == 24
    assert ray.get(replicas[0].info.remote(), timeout=60).count == 6
    with pytest.raises(RetrieverError, match="k must be"):
        asyncio.run(searching.search("q", 0))

    ray.kill(replicas[0])
    assert asyncio.run(ask_all()) == ["Otter", "Eagle", "Lion"] * 8
    ray.kill(replicas[1])
    with pytest.raises(RetrieverUnavailable, match="last failure"):
        asyncio.run(searching.search("q", 1))
