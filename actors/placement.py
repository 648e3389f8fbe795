"""Where the engines and the learner's ranks go: a pure function of the configuration and of what the cluster has.

Engines and ranks get bundles of one Ray placement group. On GPUs either each has its own (`nccl` transport), or engine
i and rank i share a GPU and take turns (`ipc`; `shared_memory` where some GPU has only one of the two, because a handle
is of use on its own GPU only). On CPUs they always share: the phases of an EM iteration follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from actors.weight_transfer import Transport
from pipeline.core.config import Config
from pipeline.core.errors import UserError

GPU_MEMORY_UTILIZATION = 0.9
SHARED_GPU_MEMORY_UTILIZATION = 0.4
"""Of an engine whose GPU a learner rank needs as well, at the same time."""
TURN_GPU_MEMORY_UTILIZATION = 0.7
"""Of an engine that gives it back while the learner trains. The learner's weights and CUDA's own memory stay."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`bundles[engine_bundles[i]]` holds engine i, `bundles[rank_bundles[r]]` rank r; shares are in GPUs."""

    device: Literal["cpu", "gpu"]
    transport: Transport
    bundles: list[dict[str, float]]
    engine_bundles: list[int]
    rank_bundles: list[int]
    engine_gpus: float
    rank_gpus: float
    gpu_memory_utilization: float
    """Share of a GPU's memory that an engine takes."""
    take_turns: bool
    """Engines sleep while the learner trains, and the learner keeps on the GPU only its weights while they sample."""


def plan_placement(
    config: Config, resources: Mapping[str, float], *, gpu_packages: bool, learner: bool = True
) -> Placement:
    """Lay out engines and ranks.

    Args:
        resources: total resources of the cluster as Ray names them: "CPU", "GPU".
        gpu_packages: whether the installed torch was built for GPUs, and vLLM with it; neither build does the other's
            work.
        learner: False to evaluate only: there are no ranks.

    Raises:
        UserError: the cluster has too little, or the configuration asks for a layout that does not exist.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    device = config.cluster.devices
    if device == "auto":
        device = "gpu" if gpus and gpu_packages else "cpu"
    if gpu_packages != (device == "gpu"):
        raise UserError(
            f"this run would use {device.upper()}s (cluster.devices: {config.cluster.devices}; the cluster has {gpus} "
            f"GPUs), but the packages are those for {'GPUs' if gpu_packages else 'CPUs'}; install the others with "
            f"`make setup DEVICE={device}`"
        )
    ranks = config.learner.num_ranks if learner else 0
    return _on_gpus(config, gpus, ranks) if device == "gpu" else _on_cpus(config, cpus, ranks)


def _on_cpus(config: Config, cpus: int, ranks: int) -> Placement:
    workers = config.rollout.workers
    if config.rollout.tensor_parallel_size > 1:
        raise UserError(
            "rollout.tensor_parallel_size above 1 needs GPUs; set it to 1 on this cluster of CPUs"
        )
    for key, wanted in (("rollout.workers", workers), ("learner.num_ranks", ranks)):
        if wanted > cpus:
            raise UserError(f"{key} is {wanted}, but the cluster has {cpus} CPUs; lower it or add nodes")
    if config.cluster.transport not in ("auto", "shared_memory"):
        raise UserError(
            f"cluster.transport: {config.cluster.transport} needs GPUs; use auto or shared_memory"
        )
    return Placement(
        device="cpu",
        transport="shared_memory",
        bundles=[{"CPU": 1.0}] * max(workers, ranks),
        engine_bundles=list(range(workers)),
        rank_bundles=list(range(ranks)),
        engine_gpus=0.0,
        rank_gpus=0.0,
        gpu_memory_utilization=0.0,
        take_turns=False,
    )


def _on_gpus(config: Config, gpus: int, ranks: int) -> Placement:
    rollout, retriever = config.rollout, config.retriever
    workers, tensor_parallel = rollout.workers, rollout.tensor_parallel_size
    for_retrievers = math.ceil(retriever.replicas * retriever.gpus_per_replica)
    apart = workers * tensor_parallel + ranks + for_retrievers
    together = max(workers, ranks) + for_retrievers
    mode = config.cluster.colocate
    colocate = ranks > 0 and (mode == "yes" or (mode == "auto" and apart > gpus))
    wanted = together if colocate else apart
    if wanted > gpus:
        raise UserError(
            f"rollout.workers ({workers}) x rollout.tensor_parallel_size ({tensor_parallel}), learner.num_ranks "
            f"({ranks}) and retriever.replicas x retriever.gpus_per_replica ({for_retrievers}) need {wanted} GPUs"
            f"{' even when engines and ranks share' if colocate else ''}, but the cluster has {gpus}; lower them or "
            "add nodes"
        )
    if colocate and tensor_parallel > 1:
        raise UserError(
            "engines with rollout.tensor_parallel_size above 1 cannot share GPUs with the learner; give them their own "
            f"({apart} GPUs in all) or set it to 1"
        )
    bundles = [{"CPU": 1.0, "GPU": float(tensor_parallel)}] * workers + [{"CPU": 1.0, "GPU": 1.0}] * ranks
    shared = [{"CPU": 2.0, "GPU": 1.0}] * max(workers, ranks)
    take_turns = colocate and config.cluster.take_turns
    default = GPU_MEMORY_UTILIZATION
    if colocate:
        default = TURN_GPU_MEMORY_UTILIZATION if take_turns else SHARED_GPU_MEMORY_UTILIZATION
    return Placement(
        device="gpu",
        transport=_transport(config, ranks, colocate),
        bundles=shared if colocate else bundles,
        engine_bundles=list(range(workers)),
        rank_bundles=list(range(ranks)) if colocate else list(range(workers, workers + ranks)),
        engine_gpus=0.5 if colocate else float(tensor_parallel),
        rank_gpus=0.5 if colocate else 1.0,
        gpu_memory_utilization=rollout.gpu_memory_utilization or default,
        take_turns=take_turns,
    )


def _transport(config: Config, ranks: int, colocate: bool) -> Transport:
    """The transport that was asked for, or the fastest one of the layout."""
    asked, paired = config.cluster.transport, ranks == config.rollout.workers
    if asked == "auto" or ranks == 0:
        return ("ipc" if paired else "shared_memory") if colocate else "nccl"
    if (asked == "ipc" and not colocate) or (asked == "nccl" and colocate):
        raise UserError(
            f"cluster.transport: {asked} does not go with engines and learner "
            f"{'on the same GPUs' if colocate else 'on GPUs of their own'}; use auto"
        )
    if asked == "ipc" and not paired:
        raise UserError(
            f"cluster.transport: ipc needs a learner rank on the GPU of every engine and the other way round, but "
            f"rollout.workers is {config.rollout.workers} and learner.num_ranks {ranks}; make them equal or use auto"
        )
    return asked
