"""Failover and errors of the retriever's client, without Ray where it can be; one test with real actors."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.retriever import (
    MAX_QUERY_CHARS,
    ActorReplica,
    HttpReplica,
    RetrieverActor,
    RetrieverClient,
)
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError, RetrieverOverloaded, RetrieverUnavailable
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit, SearchOptions
from retriever_service.search.engine import SearchEngine
from retriever_service.service.client import RetrieverHttpClient
from tests.retriever_service.fake_engine import FakeEngine
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.support import write_animals


def hits_for(query: str, k: int) -> list[Hit]:
    return [Hit(Passage(f"{query}-{rank}", "", query), 1.0 / (rank + 1)) for rank in range(k)]


class FakeReplica:
    """An actor handle whose searches end as `script` says: an exception, "hang", then hits."""

    def __init__(self, *script: Exception | str) -> None:
        self.calls = 0
        self._script = list(script)
        self.search = SimpleNamespace(remote=self._search)

    async def _search(self, queries: list[str], k: int, options: SearchOptions) -> list[list[Hit]]:
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
    handles = [ActorReplica(replica) for replica in replicas]
    return RetrieverClient(handles, timeout_s=timeout_s, max_attempts=max_attempts, backoff_s=0.001)


DEAD = ray.exceptions.ActorDiedError()


def test_what_an_actor_refuses_comes_without_the_traceback_of_its_process() -> None:
    refused = ray.exceptions.RayTaskError(
        "search", "a long traceback", RetrieverError("k must be at least 1")
    )
    replica = FakeReplica(refused.as_instanceof_cause())
    with pytest.raises(RetrieverError) as raised:
        asyncio.run(client(replica).search("q", 1))
    assert str(raised.value) == "k must be at least 1"
    assert replica.calls == 1


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
    replica = FakeReplica(RetrieverError("no such index"))
    with pytest.raises(RetrieverError, match="no such index"):
        asyncio.run(client(replica).search("q", 1))
    assert replica.calls == 1


def test_a_noisy_client_gives_passages_from_far_behind_in_place_of_some() -> None:
    noisy = RetrieverClient([ActorReplica(FakeReplica())], noise=0.5)

    async def found() -> list[list[str]]:
        return [[hit.passage.id for hit in await noisy.search(f"q{n}", 2)] for n in range(50)]

    first = asyncio.run(found())
    assert first == asyncio.run(found())
    places = {(place, id.split("-")[1]) for ids in first for place, id in enumerate(ids)}
    assert places == {(0, "0"), (0, "50"), (1, "1"), (1, "51")}


def test_what_is_asked_while_a_call_is_under_way_goes_together_in_the_next_one() -> None:
    calls: list[tuple[list[str], int]] = []

    async def noted(queries: list[str], k: int, options: SearchOptions) -> list[list[Hit]]:
        calls.append((queries, k))
        await asyncio.sleep(0.05)
        return [hits_for(query, k) for query in queries]

    async def scenario() -> None:
        searching = RetrieverClient([ActorReplica(SimpleNamespace(search=SimpleNamespace(remote=noted)))])
        first = asyncio.create_task(searching.search("a", 1))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(searching.search("gone", 1))
        more = [
            asyncio.create_task(searching.search(query, k)) for query, k in (("b", 1), ("c", 2), ("d", 1))
        ]
        with pytest.raises(RetrieverError, match="not valid Unicode"):
            await searching.search("\ud800", 1)
        gone.cancel()
        assert await first == hits_for("a", 1)
        assert await asyncio.gather(*more) == [hits_for("b", 1), hits_for("c", 2), hits_for("d", 1)]

    asyncio.run(scenario())
    assert calls == [(["a"], 1), (["b", "d"], 1), (["c"], 2)]


def test_a_call_that_fails_fails_for_all_that_went_with_it_and_each_is_tried_again() -> None:
    dead, alive = FakeReplica(DEAD), FakeReplica()

    async def scenario() -> list[list[Hit]]:
        searching = client(dead, alive)
        return await asyncio.gather(*(searching.search(query, 1) for query in "abcd"))

    assert asyncio.run(scenario()) == [hits_for(query, 1) for query in "abcd"]
    assert dead.calls == 1


def test_searches_that_wait_stay_behind_when_a_client_goes_to_another_process() -> None:
    replica = ActorReplica("handle", SearchOptions("bm25"))

    async def scenario() -> ActorReplica:
        waiting = asyncio.create_task(replica.search("a", 1))
        await asyncio.sleep(0)
        copy: ActorReplica = pickle.loads(pickle.dumps(replica))
        waiting.cancel()
        return copy

    copy = asyncio.run(scenario())
    assert (copy._handle, copy._options) == ("handle", SearchOptions("bm25"))


# ---------------------------------------------------------------- servers


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    started = [ScriptedServer(), ScriptedServer()]
    yield started
    for server in started:
        server.close()


def over_http(servers: list[ScriptedServer], *, max_attempts: int = 4) -> RetrieverClient:
    """As a rollout worker gets it: a copy."""
    replicas = [HttpReplica(RetrieverHttpClient(server.url, max_attempts=1)) for server in servers]
    made: RetrieverClient = pickle.loads(
        pickle.dumps(RetrieverClient(replicas, max_attempts=max_attempts, backoff_s=0.001))
    )
    return made


def test_searches_are_spread_over_servers(servers: list[ScriptedServer]) -> None:
    async def scenario() -> None:
        searching = over_http(servers)
        for _ in range(4):
            assert [await searching.search("lion", 2)] == FakeEngine().search(["lion"], 2)

    asyncio.run(scenario())
    assert [len(server.requests) for server in servers] == [2, 2]


@pytest.mark.parametrize("failure", [429, 503, 500, 504])
def test_server_that_fails_is_failed_over(servers: list[ScriptedServer], failure: int) -> None:
    servers[0].script = [failure]
    assert [asyncio.run(over_http(servers).search("lion", 1))] == FakeEngine().search(["lion"], 1)
    assert [len(server.requests) for server in servers] == [1, 1]


def test_servers_are_asked_no_more_often_than_there_are_attempts(servers: list[ScriptedServer]) -> None:
    for server in servers:
        server.script = [503] * 9
    with pytest.raises(RetrieverUnavailable, match=r"2 retriever replicas in 3 attempts .*status 503"):
        asyncio.run(over_http(servers, max_attempts=3).search("lion", 1))
    assert sum(len(server.requests) for server in servers) == 3


def test_mistake_that_a_server_tells_is_not_tried_again(servers: list[ScriptedServer]) -> None:
    servers[0].script = [422]
    with pytest.raises(RetrieverError, match="422: as scripted"):
        asyncio.run(over_http(servers).search("lion", 1))
    assert servers[1].requests == []


def test_degenerate_query_is_cut_to_what_servers_accept(servers: list[ScriptedServer]) -> None:
    asyncio.run(over_http(servers).search("a " * MAX_QUERY_CHARS, 1))
    ((_, body, _),) = servers[0].requests
    assert [len(query) for query in body["queries"]] == [MAX_QUERY_CHARS]


# ---------------------------------------------------------------- actors


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    threads = torch.get_num_threads()
    yield cluster
    torch.set_num_threads(threads)
    ray.shutdown()
    cluster.shutdown()


def on_node(node_id: str) -> Any:
    return RetrieverActor.options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    ).remote


@pytest.mark.component
def test_actors_on_two_nodes_answer_many_callers_and_survive_the_loss_of_one(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    build_index([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", EncoderSpec(), bm25=True)
    nodes = [two_nodes.head_node.node_id, *(node.node_id for node in two_nodes.worker_nodes)]
    replicas = [on_node(node)(tmp_path / "index", num_threads=1) for node in nodes]
    broken = on_node(nodes[0])(tmp_path / "nowhere")
    assert len(set(ray.get([replica.ready.remote() for replica in replicas], timeout=300))) == 1
    with pytest.raises(RetrieverError, match="not a built index"):
        ray.get(broken.ready.remote(), timeout=300)

    questions = [
        "Which animal swims in rivers?",
        "Which animal nests on cliffs?",
        "Who lives on the savanna?",
    ]
    searching = RetrieverClient(
        [ActorReplica(replica) for replica in replicas], timeout_s=120, backoff_s=0.01
    )

    async def ask_all() -> list[str]:
        answers = await asyncio.gather(*(searching.search(question, 2) for question in questions * 8))
        assert all(len(hits) == 2 for hits in answers)
        return [hits[0].passage.title for hits in answers]

    assert asyncio.run(ask_all()) == ["Otter", "Eagle", "Lion"] * 8
    # Spread over replicas, every answer is that of a plain search.
    plain = SearchEngine.open(tmp_path / "index", num_threads=1)
    for k in (1, 3, 9):
        for question in (*questions, " "):
            assert asyncio.run(searching.search(question, k)) == plain.search([question], k)[0]
    for method in ("bm25", "hybrid"):
        options = SearchOptions(method)
        by_words = RetrieverClient([ActorReplica(replicas[0], options)], timeout_s=120)
        assert asyncio.run(by_words.search(questions[0], 3)) == plain.search([questions[0]], 3, options)[0]
    stats = ray.get([replica.stats.remote() for replica in replicas], timeout=60)
    assert sum(entry.queries for entry in stats) == 38
    assert min(entry.queries for entry in stats) >= 12
    assert ray.get(replicas[0].info.remote(), timeout=60)["passages"] == 6
    with pytest.raises(RetrieverError, match="k must be"):
        asyncio.run(searching.search("q", 0))

    (lost,) = two_nodes.worker_nodes
    two_nodes.remove_node(lost)
    assert asyncio.run(ask_all()) == ["Otter", "Eagle", "Lion"] * 8
    ray.kill(replicas[0])
    with pytest.raises(RetrieverUnavailable, match="last failure"):
        asyncio.run(searching.search("q", 1))
