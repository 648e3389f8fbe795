"""On which nodes the replicas of the retriever live, and how many of a node's cores each of them takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from pipeline.core.packages import has_gpu_packages
from retriever_service.machine import share_of_cores

CORES_PER_GPU = 2
"""Of the processes that are busy while others search: a rollout worker and its engine."""
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Room:
    """What a node offers."""

    node: str
    """Its id."""
    cpus: float
    """In all. A node that has none as Ray counts them, such as a head, is to be left alone."""
    free_gpus: float


def homes(replicas: int, gpus: float, rooms: Sequence[Room]) -> list[str]:
    """The node of each replica, as evenly as free GPUs allow; where there are too few of them, as if there were more.

    Ray's own strategies put actors that ask for no CPUs on any nodes: of four on four, three may come to one.

    Args:
        gpus: share of a GPU that each replica needs.
    """
    free = {room.node: room.free_gpus for room in rooms if room.cpus or gpus}
    free = free or {room.node: room.free_gpus for room in rooms}
    found = Counter(dict.fromkeys(free, 0))
    chosen = []
    for _ in range(replicas):
        fitting = [node for node in free if free[node] + _ROUNDING >= gpus] or list(free)
        home = min(fitting, key=lambda node: found[node])
        free[home] -= gpus
        found[home] += 1
        chosen.append(home)
    return chosen


def rooms() -> list[Room]:
    """Of all nodes of the connected cluster."""
    free = ray._private.state.available_resources_per_node()
    return [
        Room(node["NodeID"], node["Resources"].get("CPU", 0), free.get(node["NodeID"], {}).get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def threads_of_replica(cores: int, sharers: int, gpus: int) -> int:
    """Its share of a node's cores, at least one.

    Engines generate while the retriever searches. On CPUs they are among those that share the cores: more threads than
    that would wait for each other, and cost all of them several times the time. On GPUs some cores are left to them.

    Args:
        sharers: replicas on the node, this one included, and engines that compute on its CPUs.
        gpus: of the node, which engines and learner ranks use.
    """
    return share_of_cores(cores, sharers, kept=CORES_PER_GPU * gpus)


def gpus_here() -> int:
    """GPUs of the node that this actor lives on; none where the packages are those for CPUs."""
    if not has_gpu_packages():
        return 0
    here = ray.get_runtime_context().get_node_id()
    return int(next(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["NodeID"] == here))
