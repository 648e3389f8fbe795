"""Nodes that join and leave while a phase goes on, on a Ray cluster of several. Workers hold no engine."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import pool as module
from actors.engine_options import EngineOptions
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from actors.rollout import Receipt, RolloutRequest
from actors.sampling import Phase, Work, run_phase
from actors.seats import alive_nodes
from pipeline.core.agents.program import Sampling, Task, derive_seed
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import Snapshot
from pipeline.core.records import Question
from pipeline.core.shards import Counts

pytestmark = pytest.mark.component

TASK_S = 0.25
CONCURRENCY = 2
QUESTIONS = [Question(f"q{number}", "Who?", ("Ada",)) for number in range(240)]
PREEMPTION = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION


@ray.remote
class Worker:
    """A rollout worker without its engine. An episode is its seed, and where it was made."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.version = -1
        self.node = str(ray.get_runtime_context().get_node_id())

    async def where(self) -> str:
        return self.node

    async def start(self, model: str, version: int) -> int:
        self.version = version
        return 100

    async def ping(self) -> None:
        pass

    async def wants_more(self) -> None:
        await asyncio.sleep(4 * TASK_S)

    @ray.method(num_returns=2)
    async def rollout(self, request: RolloutRequest) -> tuple[Receipt, tuple[int, str]]:
        assert self.version == 7
        await asyncio.sleep(TASK_S)
        return Receipt(Counts(1), 100), (derive_seed(request.sampling.seed, request.task.id), self.node)

    async def shutdown(self) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without room and two nodes with room for one worker each."""
    monkeypatch.setattr(module, "RolloutActor", Worker)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def group(cluster: Cluster) -> PlacementGroup:
    held = placement_group([{"CPU": 1.0}] * 2, strategy="SPREAD")
    assert held.wait(60)
    return held


def started(group: PlacementGroup, **rollout: Any) -> EnginePool:
    """A pool of two workers."""

    def room(bundle: int | None, gpus: float) -> dict[str, Any]:
        if bundle is None:
            return {"num_cpus": 1}
        return {"num_cpus": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle)}

    made = EnginePool(
        "a",
        EngineOptions("model"),
        RolloutConfig(workers=2, concurrency=CONCURRENCY, max_restarts=0, **rollout),
        ClusterConfig(),
        PolicyPlacement("shared_memory", [0, 1], [], 0.0, 0.0, 0.0),
        room,
        None,  # type: ignore[arg-type]
    )
    made.start(Snapshot(7, "model"))
    return made


class Sampled:
    """What a phase gave in which something happened: when 10 tasks were done, and when a node that joined had done 5.

    Before that nobody gets much further: however slow the machine is, the order is the same.
    """

    def __init__(self, pool: EnginePool, first: Callable[[], object], then: Callable[[str], object]) -> None:
        self.seeds: dict[str, int] = {}
        self.nodes: list[tuple[float, str]] = []
        self.joined = ""
        # Ray's test clusters want the main thread, so the driver's loop stands still while something happens.
        self._first, self._then = first, then
        self._known = {receiver.node_id for receiver in pool.receivers()}
        self._may_go_on = asyncio.Event()
        phase = Phase(None, 1, Sampling(1.0, seed=3), max_failure_share=0.0)  # type: ignore[arg-type]
        work = run_phase(phase, Work(QUESTIONS), {"talker": pool}, self._keep, lambda done: None)
        asyncio.run(asyncio.wait_for(work, 240))

    async def _keep(self, task: Task, counts: Counts, reference: Any) -> None:
        seed, node = await reference
        assert task.id not in self.seeds, "a task was counted twice"
        self.seeds[task.id] = seed
        self.nodes.append((time.monotonic(), node))
        if len(self.seeds) == 10:
            self._first()
        if node not in self._known:
            self.joined = node
            if self.per_node[node] == 5:
                self._then(node)
                self._may_go_on.set()
        elif len(self.seeds) > 30:
            await self._may_go_on.wait()

    @property
    def per_node(self) -> Counter[str]:
        return Counter(node for _, node in self.nodes)


EXPECTED = {question.id: derive_seed(3, question.id) for question in QUESTIONS}


def test_nodes_that_join_take_work_and_nodes_that_are_killed_cost_what_they_had_in_hand(
    cluster: Cluster, group: PlacementGroup
) -> None:
    pool = started(group, max_workers=4)
    victim = next(iter(cluster.worker_nodes))
    up: list[float] = []

    def join() -> None:
        cluster.add_node(num_cpus=1)
        up.append(time.monotonic())

    sampled = Sampled(pool, join, lambda joined: cluster.remove_node(victim))
    assert sampled.seeds == EXPECTED
    first = min(when for when, node in sampled.nodes if node == sampled.joined)
    print(f"\nthe first task of a node that joined was done {first - up[0]:.1f} s after the node was up")
    assert first - up[0] < 30.0
    assert sampled.per_node[victim.node_id] > 0
    assert victim.node_id not in {receiver.node_id for receiver in pool.receivers()}
    pool.close()


@pytest.mark.chaos
def test_a_drained_node_ends_its_work_and_is_free_to_go(cluster: Cluster, group: PlacementGroup) -> None:
    pool = started(group, max_workers=4)
    reserved = {receiver.node_id for receiver in pool.receivers()}

    def drain(joined: str) -> None:
        deadline_ms = int((time.time() + 600) * 1000)
        accepted, why_not = global_worker.gcs_client.drain_node(joined, PREEMPTION, "", deadline_ms)
        assert accepted, why_not

    sampled = Sampled(pool, lambda: cluster.add_node(num_cpus=1), drain)
    assert sampled.seeds == EXPECTED
    assert set(sampled.per_node) == reserved | {sampled.joined}
    assert {receiver.node_id for receiver in pool.receivers()} == reserved
    # Ray ends a node that is to leave as soon as no actor lives there.
    deadline = time.monotonic() + 60
    while sampled.joined in alive_nodes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pool.close()


@pytest.mark.chaos
def test_a_worker_whose_node_is_gone_comes_back_on_a_node_that_joins(
    cluster: Cluster, group: PlacementGroup
) -> None:
    """Ray looks for another place for its bundle with growing pauses, of up to a minute."""
    pool = started(group)
    first = {receiver.node_id for receiver in pool.receivers()}
    lost = cluster.worker_nodes.copy().pop()

    async def work() -> None:
        async with pool.at_work(), asyncio.timeout(180):
            cluster.remove_node(lost)
            while len(pool.receivers()) == 2:
                await asyncio.sleep(0.1)
            cluster.add_node(num_cpus=1)
            while len(pool.receivers()) < 2:
                await asyncio.sleep(0.1)

    asyncio.run(work())
    nodes = {receiver.node_id for receiver in pool.receivers()}
    assert lost.node_id not in nodes and len(nodes - first) == 1
    pool.close()
