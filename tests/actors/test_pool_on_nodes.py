"""The replacement of a worker whose node is gone lives on another node that has room. Workers hold no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import pool as module
from actors.engine import EngineOptions
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import Snapshot


@ray.remote
class Worker:
    """A rollout worker without its engine."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.version = -1

    async def start(self, version: int) -> str:
        self.version = version
        return str(ray.get_runtime_context().get_node_id())

    async def ping(self) -> None:
        pass

    async def served(self) -> int:
        return self.version

    async def shutdown(self) -> None:
        pass


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room and two nodes with room for one worker each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.component
def test_a_worker_whose_node_is_gone_comes_back_on_a_node_that_joins(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RolloutActor", Worker)
    group = placement_group([{"CPU": 1.0}] * 2, strategy="SPREAD")
    assert group.wait(60)

    def bundle(index: int, gpus: float) -> dict[str, Any]:
        return {"num_cpus": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}

    pool = EnginePool(
        "a",
        EngineOptions("model"),
        RolloutConfig(workers=2),
        ClusterConfig(heartbeat_timeout_s=4.0),
        PolicyPlacement("shared_memory", [0, 1], [], 0.0, 0.0, 0.0),
        bundle,
        None,  # type: ignore[arg-type]
    )
    pool.start(Snapshot(7, "model"))
    first = {receiver.node_id for receiver in pool.receivers()}
    lost = cluster.worker_nodes.copy().pop()
    cluster.remove_node(lost)

    async def work() -> list[int]:
        async with pool.at_work(), asyncio.timeout(120):
            while len(pool.receivers()) == 2:
                await asyncio.sleep(0.1)
            versions = [await (await pool.worker_for(slot)).served.remote() for slot in range(2)]
            cluster.add_node(num_cpus=1)
            while len(pool.receivers()) < 2:
                await asyncio.sleep(0.1)
            return [*versions, *[await (await pool.worker_for(slot)).served.remote() for slot in range(2)]]

    assert asyncio.run(work()) == [7, 7, 7, 7]
    nodes = {receiver.node_id for receiver in pool.receivers()}
    assert lost.node_id not in nodes and len(nodes - first) == 1
    pool.close()
