"""The machines of a cluster, as far as a plan must know them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.core.plan.memory import GIB
from retriever_service.machine import total_memory

GPU_MEMORY_GIB = 79.6
"""Of a card that is sold as one of 80 GB."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine, or what a container has of it. Sizes in bytes; a host's memory of 0 is not known."""

    cpus: int
    gpus: int
    gpu_memory: int
    memory: int


Nodes = tuple[Node, ...]


def this_machine() -> Nodes:
    """What is here. CPUs as Ray counts them: all of the machine."""
    import torch

    gpus = torch.cuda.device_count()
    memory = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0)
    return (Node(os.cpu_count() or 1, gpus, memory, total_memory()),)


def gpu_nodes(nodes: int, gpus: int, gpu_memory_gib: float, memory_gib: float | None) -> Nodes:
    """Equal machines with GPUs, which need not be there; their cores are taken to be enough."""
    node = Node(
        cpus=max(64, 8 * gpus),
        gpus=gpus,
        gpu_memory=round(gpu_memory_gib * GIB),
        memory=round((memory_gib or 0) * GIB),
    )
    return (node,) * nodes
