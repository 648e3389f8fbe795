"""The shipped configurations for four nodes, on a Ray cluster of four nodes: who is where, as documented.

Ray, the reservation, the policy, its pool and its learner's group are real. GPUs are a number that Ray counts, and the
actors are stand-ins that know no more than where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from actors import learner_group, pool, reservation, weighting
from actors import retrievers as retrievers_module
from actors.cluster import Cluster
from actors.engine_options import EngineOptions
from pipeline.core.config.loading import load_config
from pipeline.em import searcher_of
from tests.actors import stand_ins
from tests.actors.stand_ins import Place, StandIns

pytestmark = [pytest.mark.component, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NODES = 4


@dataclass(frozen=True)
class Nodes:
    """Four of them: their ids, and the GPUs of each; CPUs are twice as many."""

    ids: list[str]
    gpus: int


@pytest.fixture(
    scope="module",
    # As many as the configurations are for, and so few that it takes seconds.
    params=[2, pytest.param(8, marks=pytest.mark.chaos)],
    ids="{} GPUs a node".format,
)
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    has = {"num_cpus": 2 * request.param, "num_gpus": request.param}
    cluster = RayCluster(initialize_head=True, head_node_args={**has, "include_dashboard": False})
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**has)
        ray.init(address=cluster.address, log_to_driver=False)
        yield Nodes([node["NodeID"] for node in ray.nodes()], request.param)
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass
class Started:
    """What a configuration has started."""

    cluster: Cluster
    engines: StandIns
    ranks: StandIns
    retrievers: StandIns

    @property
    def options(self) -> EngineOptions:
        """Of every engine."""
        (options,) = {options for options, _ in self.engines.arguments}
        return options

    @property
    def transports(self) -> tuple[str, str]:
        """That the learner uses, and that engines are built for."""
        return self.cluster.placement.policies["searcher"].transport, self.options.weight_transport

    def slept(self) -> list[int]:
        """How often each engine did."""
        return list(ray.get([handle.slept.remote() for handle in self.engines.handles]))


@contextmanager
def training(name: str, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """The configuration, with as many engines and ranks as go with the GPUs of a node, when it has begun to train."""
    config = load_config(ROOT / "configs" / name)
    scaled = {"rollout.workers": config.rollout.workers, "learner.num_ranks": config.learner.num_ranks}
    overrides = [f"{key}={number * nodes.gpus // 8}" for key, number in scaled.items()]
    config = load_config(ROOT / "configs" / name, overrides)
    engines, ranks, retrievers = stand_ins.engines(), stand_ins.ranks(), stand_ins.retrievers()
    monkeypatch.setattr(reservation, "has_gpu_packages", lambda: True)
    monkeypatch.setattr(pool, "RolloutActor", engines)
    monkeypatch.setattr(learner_group, "LearnerRank", ranks)
    monkeypatch.setattr(retrievers_module, "RetrieverActor", retrievers)
    monkeypatch.setattr(weighting, "WeightingActor", stand_ins.weighting())
    with Cluster([searcher_of(config)], config.cluster, config.retriever, Path("an-index")) as cluster:
        loss: Any = None
        cluster.policy("searcher").train([], loss, state=Path("a-state"), seed=0)
        yield Started(cluster, engines, ranks, retrievers)


def per_node(places: list[Place]) -> Counter[str]:
    return Counter(place.node for place in places)


def test_engines_and_ranks_share_every_gpu_and_take_turns(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training("llama3.1-8b-4x8gpu.yaml", nodes, monkeypatch) as found:
        engines, ranks, number = found.engines.places(), found.ranks.places(), NODES * nodes.gpus

        assert engines == ranks
        assert per_node(engines) == dict.fromkeys(nodes.ids, nodes.gpus)
        assert all(len(place.gpus) == 1 for place in engines) and len(set(engines)) == number
        assert [told["rank"] for told in found.ranks.keywords] == list(range(number))
        assert all(told["world_size"] == number for told in found.ranks.keywords)

        assert found.transports == ("ipc", "ipc")
        assert (found.options.gpu_memory_utilization, found.options.sleeps) == (0.7, True)
        assert found.slept() == [1] * number
        assert per_node(found.retrievers.places()) == dict.fromkeys(nodes.ids, 1)
        # Two of each bundle; nobody else reserves any.
        assert ray.available_resources().get("CPU", 0.0) == 0.0


def test_apart_two_nodes_generate_and_two_learn(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    with training("llama3.1-8b-4x8gpu-apart.yaml", nodes, monkeypatch) as found:
        engines, ranks = found.engines.places(), found.ranks.places()

        assert all(len(place.gpus) == 1 for place in (*engines, *ranks))
        assert len({*engines, *ranks}) == NODES * nodes.gpus
        assert sorted(per_node(engines).values()) == sorted(per_node(ranks).values()) == [nodes.gpus] * 2
        assert not per_node(engines).keys() & per_node(ranks).keys()

        assert found.transports == ("nccl", "nccl")
        assert (found.options.gpu_memory_utilization, found.options.sleeps) == (0.9, False)
        assert not any(found.slept())
        assert per_node(found.retrievers.places()) == dict.fromkeys(nodes.ids, 1)
        assert ray.available_resources()["CPU"] == NODES * nodes.gpus
