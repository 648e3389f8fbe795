"""The machines of a cluster, as far as a plan must know them, and how fast a core of this one is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pipeline.core.plan.memory import GIB, Dtype
from retriever_service.machine import available_memory, total_memory

GPU_MEMORY_GIB = 79.6
"""Of a card that is sold as one of 80 GB."""
_ROWS, _PRODUCTS, _ENOUGH_S = 1_024, 5, 0.5
"""Of the square matrices that are multiplied to see how fast a core is, and when that is known well enough."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine, or what a container has of it. Sizes in bytes; a host's memory of 0 is not known, and what of it is
    free is known of this machine alone."""

    cpus: int
    gpus: int
    gpu_memory: int
    memory: int
    free_memory: int | None = None


Nodes = tuple[Node, ...]


def this_machine() -> Nodes:
    """What is here. CPUs as Ray counts them: all of the machine."""
    import torch

    gpus = torch.cuda.device_count()
    memory = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0)
    return (Node(os.cpu_count() or 1, gpus, memory, total_memory(), available_memory()),)


def gpu_nodes(nodes: int, gpus: int, gpu_memory_gib: float, memory_gib: float | None) -> Nodes:
    """Equal machines with GPUs, which need not be there; their cores are taken to be enough."""
    node = Node(
        cpus=max(64, 8 * gpus),
        gpus=gpus,
        gpu_memory=round(gpu_memory_gib * GIB),
        memory=round((memory_gib or 0) * GIB),
    )
    return (node,) * nodes


def core_tflops(dtype: Dtype) -> float:
    """Of a core of this machine, in 1e12 operations a second of its own time, of which other work on the machine takes
    little: the best of some matrix products on all of them, in half a second or little more."""
    import torch

    a, b = (torch.rand(_ROWS, _ROWS, dtype=getattr(torch, dtype)) for _ in range(2))
    times = list[float]()  # of all threads together
    while len(times) < 2 or (
        len(times) < _PRODUCTS and sum(times) < _ENOUGH_S
    ):  # the first one also warms up
        begun = time.process_time()
        a @ b
        times.append(time.process_time() - begun)
    return 2 * _ROWS**3 / min(times) / 1e12
