"""Where the engines and the learner's ranks go: a pure function of the configuration and of what the cluster has.

Engines and ranks get bundles of one Ray placement group. On GPUs either each has its own (`nccl` transport), or engine
i and rank i share a GPU and take turns (`ipc`). On CPUs they always share: the phases of an EM iteration follow each
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from actors.weight_transfer import Transport
from pipeline.config import Config
from pipeline.errors import UserError


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


def plan_placement(config: Config, resources: Mapping[str, float]) -> Placement:
    """Lay out engines and ranks.

    Args:
        resources: total resources of the cluster as Ray names them: "CPU", "GPU".

    Raises:
        UserError: the cluster has too little, or the configuration asks for a layout that does not exist.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    device = config.cluster.devices
    if device == "auto":
        device = "gpu" if gpus else "cpu"
    return _on_gpus(config, gpus) if device == "gpu" else _on_cpus(config, cpus)


def _on_cpus(config: Config, cpus: int) -> Placement:
    workers, ranks = config.rollout.workers, config.learner.num_ranks
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
    )


def _on_gpus(config: Config, gpus: int) -> Placement:
    workers, ranks = config.rollout.workers, config.learner.num_ranks
    tensor_parallel, mode = config.rollout.tensor_parallel_size, config.cluster.colocate
    apart = workers * tensor_parallel + ranks
    together = max(workers, ranks)
    colocate = mode == "yes" or (mode == "auto" and apart > gpus)
    wanted = together if colocate else apart
    if wanted > gpus:
        raise UserError(
            f"rollout.workers ({workers}) x rollout.tensor_parallel_size ({tensor_parallel}) and learner.num_ranks "
            f"({ranks}) need {wanted} GPUs{' even when they share' if colocate else ''}, but the cluster has {gpus}; "
            "lower them or add nodes"
        )
    if colocate and tensor_parallel > 1:
        raise UserError(
            "engines with rollout.tensor_parallel_size above 1 cannot share GPUs with the learner; give them their own "
            f"({apart} GPUs in all) or set it to 1"
        )
    transport = config.cluster.transport
    if transport == "auto":
        transport = "ipc" if colocate else "nccl"
    if (transport == "ipc" and not colocate) or (transport == "nccl" and colocate):
        raise UserError(
            f"cluster.transport: {transport} does not go with engines and learner "
            f"{'on the same GPUs' if colocate else 'on GPUs of their own'}; use auto"
        )
    if colocate:
        return Placement(
            device="gpu",
            transport=transport,
            bundles=[{"CPU": 2.0, "GPU": 1.0}] * together,
            engine_bundles=list(range(workers)),
            rank_bundles=list(range(ranks)),
            engine_gpus=0.5,
            rank_gpus=0.5,
        )
    return Placement(
        device="gpu",
        transport=transport,
        bundles=[{"CPU": 1.0, "GPU": float(tensor_parallel)}] * workers + [{"CPU": 1.0, "GPU": 1.0}] * ranks,
        engine_bundles=list(range(workers)),
        rank_bundles=list(range(workers, workers + ranks)),
        engine_gpus=float(tensor_parallel),
        rank_gpus=1.0,
    )
