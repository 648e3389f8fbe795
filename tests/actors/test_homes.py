"""Where replicas of the retriever live, and how many cores each has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import homes as module
from actors import retrievers
from actors.homes import Room, gpus_here, homes, threads_of_replica
from actors.pool import engines_per_node
from actors.retriever import Health
from actors.retrievers import Retrievers
from pipeline.core.config import RetrieverConfig


@pytest.mark.parametrize(
    ("cores", "replicas", "gpus", "threads"),
    [
        (16, 1, 0, 16),
        (16, 3, 0, 5),
        (2, 4, 0, 1),
        (96, 1, 8, 80),  # eight engines keep two cores each
        (96, 2, 8, 40),
        (16, 2, 8, 1),
    ],
)
def test_a_replica_takes_its_share_of_the_cores_that_the_node_s_gpus_leave(
    cores: int, replicas: int, gpus: int, threads: int
) -> None:
    assert threads_of_replica(cores, replicas, gpus) == threads


def rooms(*free_gpus: float, cpus: float = 8.0) -> list[Room]:
    return [Room(f"n{number}", cpus, free) for number, free in enumerate(free_gpus)]


def test_replicas_are_spread_evenly_and_leave_a_head_without_cpus_alone() -> None:
    nodes = [Room("head", 0, 0), *rooms(0, 0, 0)]
    assert Counter(homes(7, 0.0, nodes)) == {"n0": 3, "n1": 2, "n2": 2}
    assert homes(2, 0.0, [Room("head", 0, 0)]) == ["head", "head"]


def test_replicas_with_gpus_go_where_some_are_free() -> None:
    assert homes(3, 1.0, rooms(0, 1, 4)) == ["n1", "n2", "n2"]
    assert homes(10, 0.1, rooms(0, 1)) == ["n1"] * 10
    assert homes(2, 1.0, [Room("gpus", 0, 2), Room("cpus", 8, 0)]) == ["gpus", "gpus"]


def test_where_no_gpu_is_free_yet_replicas_are_thought_to_be_spread() -> None:
    assert sorted(homes(4, 1.0, rooms(0, 0))) == ["n0", "n0", "n1", "n1"]


# ---------------------------------------------------------------- on real nodes


@ray.remote(max_concurrency=10)
class Replica:
    """A replica without an index, which remembers what it was told."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        self.told = options

    async def ready(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def health(self) -> Health:
        return Health("process", 0.0)

    async def options(self) -> dict[str, Any]:
        return self.told


@pytest.fixture
def four_nodes() -> Iterator[Cluster]:
    """A head without CPUs, two nodes with one, and one with one and three GPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for gpus in (0, 0, 3):
        cluster.add_node(num_cpus=1, num_gpus=gpus)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.component
def test_each_node_of_a_cluster_gets_as_many_replicas_and_they_know_it(
    four_nodes: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(retrievers, "RetrieverActor", Replica)
    workers = {node.node_id for node in four_nodes.worker_nodes}
    config = RetrieverConfig(replicas=6, threads_per_replica=5, local_copy="/nvme")
    started = Retrievers(config, tmp_path, runtime_env={}, start_timeout_s=60)
    started.wait()
    where = ray.get([actor.ready.remote() for actor in started._actors])
    assert Counter(where) == dict.fromkeys(workers, 2)
    for told in ray.get([actor.options.remote() for actor in started._actors]):
        assert (told["sharers"], told["num_threads"], told["local_copy"]) == (2, 5, "/nvme")
    started.close()

    config = RetrieverConfig(replicas=3, gpus_per_replica=1)
    started = Retrievers(config, tmp_path, runtime_env={}, start_timeout_s=60, engines=2)
    started.wait()
    where = ray.get([actor.ready.remote() for actor in started._actors])
    assert len(set(where)) == 1
    assert [told["sharers"] for told in ray.get([a.options.remote() for a in started._actors])] == [5] * 3
    started.close()


@pytest.mark.component
def test_engines_and_gpus_are_counted_on_the_nodes_that_have_them(four_nodes: Cluster) -> None:
    assert engines_per_node(3) == 1
    assert engines_per_node(4) == 2

    def count(has_gpu_packages: bool) -> int:
        module.has_gpu_packages = lambda: has_gpu_packages
        return gpus_here()

    on_gpus = ray.remote(num_gpus=1)(count).remote
    assert ray.get([on_gpus(True), on_gpus(False)], timeout=60) == [3, 0]
    assert ray.get(ray.remote(num_cpus=0)(count).remote(False), timeout=60) == 0
