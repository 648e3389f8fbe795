"""Where engines and learner ranks go: a pure function of the policies and of what the cluster has.

Engines and ranks get bundles of one Ray placement group. On GPUs either each engine has its own and so has each rank
(`nccl` transport), or engine i and rank i share a GPU and take turns (`ipc`; `shared_memory` where some GPU has only
one of the two, because a handle is of use on its own GPU only). On CPUs they always share: the phases of an iteration
follow each other. Learners of several policies train one after the other, so their ranks always share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.weight_transfer import Transport
from pipeline.core.config import ClusterConfig, RetrieverConfig
from pipeline.core.errors import UserError
from pipeline.core.packages import how_to_install
from pipeline.core.policies import PolicySpec

GPU_MEMORY_UTILIZATION = 0.9
SHARED_GPU_MEMORY_UTILIZATION = 0.4
"""Of an engine whose GPU a learner rank needs as well, at the same time."""
TURN_GPU_MEMORY_UTILIZATION = 0.7
"""Of an engine that gives it back while the learner trains. The learner's weights and CUDA's own memory stay."""


@dataclass(frozen=True, slots=True)
class PolicyPlacement:
    """`Placement.bundles[engine_bundles[i]]` holds engine i, `[rank_bundles[r]]` rank r; shares are in GPUs."""

    transport: Transport
    engine_bundles: list[int]
    rank_bundles: list[int]
    engine_gpus: float
    rank_gpus: float
    gpu_memory_utilization: float
    """Share of a GPU's memory that an engine takes."""
    joiner_gpus: float = 0.0
    """Of an engine that joins later and has no bundle."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The layout of a run."""

    device: Literal["cpu", "gpu"]
    bundles: list[dict[str, float]]
    policies: dict[str, PolicyPlacement]
    take_turns: bool
    """Engines sleep while a learner trains. On GPUs learners keep there only their weights while engines sample."""


def plan_placement(
    policies: Sequence[PolicySpec],
    cluster: ClusterConfig,
    retriever: RetrieverConfig,
    resources: Mapping[str, float],
    *,
    gpu_packages: bool,
) -> Placement:
    """Lay out engines and ranks.

    Args:
        resources: total resources of the cluster as Ray names them: "CPU", "GPU".
        gpu_packages: whether the installed torch was built for GPUs, and vLLM with it; neither build does the other's
            work.

    Raises:
        UserError: the cluster has too little, or the configuration asks for a layout that does not exist.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    device = cluster.devices
    if device == "auto":
        device = "gpu" if gpus and gpu_packages else "cpu"
    if gpu_packages != (device == "gpu"):
        raise UserError(
            f"this run would use {device.upper()}s (cluster.devices: {cluster.devices}; the cluster has {gpus} GPUs), "
            f"but the packages are those for {'GPUs' if gpu_packages else 'CPUs'}; the others are installed by: "
            f"{how_to_install(device)}"
        )
    if device == "gpu":
        return _on_gpus(policies, cluster, retriever, gpus)
    return _on_cpus(policies, cluster, cpus)


def _workers(policy: PolicySpec) -> int:
    return policy.rollout.workers if policy.rollout is not None else 0


def _tensor_parallel(policy: PolicySpec) -> int:
    return policy.rollout.tensor_parallel_size if policy.rollout is not None else 1


def _ranks(policy: PolicySpec) -> int:
    return policy.learner.num_ranks if policy.learner is not None else 0


def _on_cpus(policies: Sequence[PolicySpec], cluster: ClusterConfig, cpus: int) -> Placement:
    if any(_tensor_parallel(policy) > 1 for policy in policies):
        raise UserError(
            "rollout.tensor_parallel_size above 1 needs GPUs; set it to 1 on this cluster of CPUs"
        )
    workers, ranks = max(map(_workers, policies)), max(map(_ranks, policies))
    for key, wanted in (("rollout.workers", workers), ("learner.num_ranks", ranks)):
        if wanted > cpus:
            raise UserError(f"{key} is {wanted}, but the cluster has {cpus} CPUs; lower it or add nodes")
    if cluster.transport not in ("auto", "shared_memory"):
        raise UserError(f"cluster.transport: {cluster.transport} needs GPUs; use auto or shared_memory")
    return Placement(
        device="cpu",
        bundles=[{"CPU": 1.0}] * max(workers, ranks),
        policies={
            policy.name: PolicyPlacement(
                transport="shared_memory",
                engine_bundles=list(range(_workers(policy))),
                rank_bundles=list(range(_ranks(policy))),
                engine_gpus=0.0,
                rank_gpus=0.0,
                gpu_memory_utilization=0.0,
            )
            for policy in policies
        },
        take_turns=ranks > 0 and cluster.take_turns,
    )


def _on_gpus(
    policies: Sequence[PolicySpec], cluster: ClusterConfig, retriever: RetrieverConfig, gpus: int
) -> Placement:
    for_retrievers = math.ceil(retriever.replicas * retriever.gpus_per_replica)
    ranks = max(map(_ranks, policies))
    engine_gpus = sum(_workers(policy) * _tensor_parallel(policy) for policy in policies)
    apart = engine_gpus + ranks + for_retrievers
    together = max(ranks, *map(_workers, policies)) + for_retrievers
    can_share = ranks > 0 or len(policies) > 1
    colocate = can_share and (cluster.colocate == "yes" or (cluster.colocate == "auto" and apart > gpus))
    wanted = together if colocate else apart
    if wanted > gpus:
        raise UserError(
            f"{_demands(policies)} and retriever.replicas x retriever.gpus_per_replica ({for_retrievers}) need "
            f"{wanted} GPUs{' even when engines and ranks share' if colocate else ''}, but the cluster has {gpus}; "
            "lower them or add nodes"
        )
    if colocate and any(_tensor_parallel(policy) > 1 for policy in policies):
        raise UserError(
            "engines with rollout.tensor_parallel_size above 1 cannot share GPUs with the learner; give them their own "
            f"({apart} GPUs in all) or set it to 1"
        )
    if colocate:
        return _sharing(policies, cluster, ranks)
    return _apart(policies, cluster, ranks)


def _demands(policies: Sequence[PolicySpec]) -> str:
    each = [
        f"rollout.workers ({_workers(policy)}) x rollout.tensor_parallel_size ({_tensor_parallel(policy)}), "
        f"learner.num_ranks ({_ranks(policy)})"
        for policy in policies
    ]
    if len(policies) == 1:
        return each[0]
    return "; ".join(f"{policy.name}: {demand}" for policy, demand in zip(policies, each, strict=True))


def _sharing(policies: Sequence[PolicySpec], cluster: ClusterConfig, ranks: int) -> Placement:
    """Every engine and every rank of every policy on the same GPUs."""
    take_turns = ranks > 0 and cluster.take_turns
    sampled = sum(_workers(policy) > 0 for policy in policies)
    tenants = sampled + sum(_ranks(policy) > 0 for policy in policies)
    memory = GPU_MEMORY_UTILIZATION
    if ranks:
        memory = TURN_GPU_MEMORY_UTILIZATION if take_turns else SHARED_GPU_MEMORY_UTILIZATION
    return Placement(
        device="gpu",
        bundles=[{"CPU": float(tenants), "GPU": 1.0}] * max(ranks, *map(_workers, policies)),
        policies={
            policy.name: PolicyPlacement(
                transport=_transport(policy, cluster, shares=True),
                engine_bundles=list(range(_workers(policy))),
                rank_bundles=list(range(_ranks(policy))),
                engine_gpus=1.0 / tenants,
                rank_gpus=1.0 / tenants,
                gpu_memory_utilization=_utilization(policy, memory / max(1, sampled)),
                joiner_gpus=1.0,
            )
            for policy in policies
        },
        take_turns=take_turns,
    )


def _apart(policies: Sequence[PolicySpec], cluster: ClusterConfig, ranks: int) -> Placement:
    """Every engine on GPUs of its own; ranks on GPUs of theirs, those of several policies on the same."""
    bundles: list[dict[str, float]] = []
    engines: dict[str, list[int]] = {}
    for policy in policies:
        first = len(bundles)
        bundles += [{"CPU": 1.0, "GPU": float(_tensor_parallel(policy))}] * _workers(policy)
        engines[policy.name] = list(range(first, len(bundles)))
    first_rank = len(bundles)
    trained = sum(_ranks(policy) > 0 for policy in policies)
    return Placement(
        device="gpu",
        bundles=bundles + [{"CPU": float(max(1, trained)), "GPU": 1.0}] * ranks,
        policies={
            policy.name: PolicyPlacement(
                transport=_transport(policy, cluster, shares=False),
                engine_bundles=engines[policy.name],
                rank_bundles=list(range(first_rank, first_rank + _ranks(policy))),
                engine_gpus=float(_tensor_parallel(policy)),
                rank_gpus=1.0 / max(1, trained),
                gpu_memory_utilization=_utilization(policy, GPU_MEMORY_UTILIZATION),
                joiner_gpus=float(_tensor_parallel(policy)),
            )
            for policy in policies
        },
        take_turns=False,
    )


def _utilization(policy: PolicySpec, default: float) -> float:
    return (policy.rollout.gpu_memory_utilization if policy.rollout is not None else None) or default


def _transport(policy: PolicySpec, cluster: ClusterConfig, *, shares: bool) -> Transport:
    """The transport that was asked for, or the fastest one of the layout."""
    grows = policy.rollout is not None and policy.rollout.most_workers > policy.rollout.workers
    asked, paired = cluster.transport, _ranks(policy) == _workers(policy) and not grows
    if asked == "auto" or _ranks(policy) == 0 or _workers(policy) == 0:
        return ("ipc" if paired else "shared_memory") if shares else "nccl"
    if (asked == "ipc" and not shares) or (asked == "nccl" and shares):
        raise UserError(
            f"cluster.transport: {asked} does not go with engines and learner "
            f"{'on the same GPUs' if shares else 'on GPUs of their own'}; use auto"
        )
    if asked == "ipc" and not paired:
        raise UserError(
            f"cluster.transport: ipc needs a learner rank on the GPU of every engine and the other way round, but "
            f"rollout.workers is {_workers(policy)}{' and may grow (rollout.max_workers)' if grows else ''} and "
            f"learner.num_ranks {_ranks(policy)}; make them equal or use auto"
        )
    return asked
