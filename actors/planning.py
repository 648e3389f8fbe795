"""From a configuration and machines to a plan: the layout as the run will have it, and what engines and ranks are told.

Nothing is started. What is computed of it is in `pipeline.core.plan`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import ray

from actors.engine_options import MOST_AGENTS, agents_that_fit, batched_tokens, in_flight
from actors.placement import Placement, PolicyPlacement, plan_placement
from actors.preflight import cluster_address
from pipeline.core.config import EXSEARCH, Config, LearnerConfig, RolloutConfig
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.disk import disk_needs
from pipeline.core.plan.engine import EngineLoad, EngineNeeds, engine_needs
from pipeline.core.plan.learner import RankLoad, rank_memory, trained_parameters
from pipeline.core.plan.machine import Node, Nodes, this_machine
from pipeline.core.plan.memory import (
    ACCELERATOR_CONTEXT,
    BYTES,
    GIB,
    Device,
    Dtype,
    Memory,
    number_format,
)
from pipeline.core.plan.needs import Layout, PolicyNeeds, Tenant
from pipeline.core.plan.phases import phases_of
from pipeline.core.plan.run_plan import RunPlan
from pipeline.core.plan.shape import ModelShape, UnknownShape, read_shape
from pipeline.core.plan.work import Trajectory, trajectory
from pipeline.core.policies import PolicySpec

logger = logging.getLogger(__name__)


def plan_run(
    config: Config,
    policies: Sequence[PolicySpec],
    nodes: Nodes,
    assumptions: Assumptions,
    *,
    gpu_packages: bool,
) -> RunPlan:
    """What a run needs on these machines.

    Args:
        gpu_packages: of the environment that the run will have.

    Raises:
        UserError: the machines have too few devices, or the configuration of a model cannot be read (`UnknownShape`).
    """
    resources = {
        "CPU": float(sum(node.cpus for node in nodes)),
        "GPU": float(sum(node.gpus for node in nodes)),
    }
    placement = plan_placement(
        policies, config.cluster, config.retriever, resources, gpu_packages=gpu_packages
    )
    layout = Layout(placement.device, _shares(placement), placement.take_turns, _on_nodes(placement, nodes))
    assumed = assumptions.settled(config.agent, placement.device)
    one = trajectory(config.agent, assumed)
    # Sentence encoders are other models than this knows, and small beside a language model.
    known = [spec for spec in policies if spec.head != "embedding"]
    needs = tuple(_policy_needs(spec, placement, nodes[0], one) for spec in known)
    iterations = config.of_recipe.iterations
    trained = [
        (
            own.shape.parameters,
            trained_parameters(own.shape, _lora(spec.learner), _latent_channels(spec)),
            _format(spec.learner, placement),
        )
        for spec, own in zip(known, needs, strict=True)
        if spec.learner is not None
    ]
    starts_cold = config.cold_start.questions > 0 or config.cold_start.trajectories is not None
    return RunPlan(
        nodes=nodes,
        layout=layout,
        policies=needs,
        retrievers=0 if config.retriever.url else config.retriever.replicas,
        trajectory=one,
        disk=disk_needs(
            trained,
            config.storage,
            versions=iterations + starts_cold,
            tokens=one.total
            * (
                iterations * config.of_recipe.sampled_questions(assumed.questions or 0) * config.most_samples
                + (iterations + 1) * config.em.dev_samples * (assumed.dev_questions or 0)
            ),
        ),
        phases=phases_of(config, needs[0], layout, nodes[0], assumed, one)
        if config.recipe == EXSEARCH
        else (),
        iterations=iterations,
        assumptions=assumed,
    )


def check_memory(config: Config, policies: Sequence[PolicySpec]) -> None:
    """This machine has the memory for the run, if it is to be the only one: with a local Ray, before that starts.

    Raises:
        UserError: it has not.
    """
    if ray.is_initialized() or cluster_address(config.cluster.address) is not None:
        return
    try:
        plan = plan_run(config, policies, this_machine(), Assumptions(), gpu_packages=has_gpu_packages())
    except UnknownShape as error:
        logger.warning(f"whether the memory is enough is not known: {error}")
        return
    plan.check()
    for line in plan.warnings():
        logger.warning(line)


# ---------------------------------------------------------------- where


def _shares(placement: Placement) -> bool:
    """Whether some bundle has an engine and a rank, or the engines of two policies."""
    tenants = [bundle for own in placement.policies.values() for bundle in own.engine_bundles]
    tenants += {bundle for own in placement.policies.values() for bundle in own.rank_bundles}
    return len(tenants) > len(set(tenants))


def _on_nodes(placement: Placement, nodes: Nodes) -> tuple[tuple[Tenant, ...], ...]:
    """As Ray's strategies would: bundles with GPUs node after node, those of CPUs in turn.

    Raises:
        UserError: an engine needs more GPUs than a node has.
    """
    homes, free = [], [node.gpus for node in nodes]
    for number, bundle in enumerate(placement.bundles):
        gpus = int(bundle.get("GPU", 0))
        home = next((n for n, left in enumerate(free) if left >= gpus), None) if gpus else number % len(nodes)
        if home is None:
            raise UserError(
                f"{len(nodes)} nodes of {nodes[0].gpus} GPUs have no room for {gpus} GPUs in one; lower "
                "rollout.tensor_parallel_size, or plan with more GPUs a node"
            )
        free[home] -= gpus
        homes.append(home)
    tenants: list[list[Tenant]] = [[] for _ in nodes]
    for name, own in placement.policies.items():
        for kind, bundles in (("engine", own.engine_bundles), ("rank", own.rank_bundles)):
            for number, bundle_number in enumerate(bundles):
                tenants[homes[bundle_number]].append(Tenant(name, kind, number))
    return tuple(tuple(some) for some in tenants)


# ---------------------------------------------------------------- of one policy


def _policy_needs(spec: PolicySpec, placement: Placement, node: Node, one: Trajectory) -> PolicyNeeds:
    own, shape = placement.policies[spec.name], read_shape(spec.model.path)
    engine = _engine(spec, spec.rollout, shape, placement, own, node) if spec.rollout else None
    rank = _rank(spec, spec.learner, shape, placement, one) if spec.learner else None
    weights = BYTES[_format(spec.learner, placement)] * shape.parameters
    pushes = spec.rollout is not None and spec.learner is not None
    on_rank = _resting_weights(spec.learner, weights) if spec.learner else 0
    return PolicyNeeds(
        name=spec.name,
        model=spec.model.path,
        shape=shape,
        engines=len(own.engine_bundles),
        engine=engine,
        tensor_parallel=spec.rollout.tensor_parallel_size if spec.rollout else 1,
        concurrency=_agents(spec.rollout, engine, spec.model.max_length, placement.device),
        ranks=len(own.rank_bundles),
        rank=rank,
        resting_bytes=on_rank + ACCELERATOR_CONTEXT if rank and placement.device == "gpu" else 0,
        push_bytes=weights if pushes else 0,
        transport=own.transport,
    )


def _engine(
    spec: PolicySpec,
    rollout: RolloutConfig,
    shape: ModelShape,
    placement: Placement,
    own: PolicyPlacement,
    node: Node,
) -> EngineNeeds:
    on_cpu = placement.device == "cpu"
    most = rollout.concurrency or MOST_AGENTS[placement.device]
    return engine_needs(
        shape,
        EngineLoad(
            device=placement.device,
            dtype=number_format(rollout.dtype, placement.device),
            max_length=spec.model.max_length,
            concurrency=most,
            batched_tokens=batched_tokens(spec.model.max_length, most, on_cpu=on_cpu),
            scored_tokens=spec.model.max_length,
            gpu_memory=node.gpu_memory,
            gpu_share=own.gpu_memory_utilization,
            cache_bytes=int(rollout.kv_cache_gib * GIB),
            tensor_parallel=rollout.tensor_parallel_size,
        ),
    )


def _resting_weights(learner: LearnerConfig, weights: int) -> int:
    """Bytes of the model on the GPU of a rank that does not train."""
    if learner.offload_parameters:
        return 0
    return weights // learner.num_ranks if learner.zero_stage == 3 else weights


def _agents(
    rollout: RolloutConfig | None, engine: EngineNeeds | None, max_length: int, device: Device
) -> int:
    """In flight per engine."""
    if rollout is None or engine is None:
        return 0
    return in_flight(
        rollout.concurrency, agents_that_fit(engine.cache.tokens, max_length), MOST_AGENTS[device]
    )


def _rank(
    spec: PolicySpec, learner: LearnerConfig, shape: ModelShape, placement: Placement, one: Trajectory
) -> Memory:
    trained = learner.tokens_per_microbatch * one.trained_share
    return rank_memory(
        shape,
        RankLoad(
            device=placement.device,
            dtype=_format(learner, placement),
            ranks=learner.num_ranks,
            zero_stage=learner.zero_stage,
            row_tokens=learner.tokens_per_microbatch,
            trained_tokens=round(trained) if spec.head == "lm" else 0,  # others have no logits
            checkpointing=learner.gradient_checkpointing,
            offload_optimizer=learner.offload_optimizer,
            offload_parameters=learner.offload_parameters,
            lora_rank=_lora(learner),
            latent_channels=_latent_channels(spec),
            keeps_reference=spec.keeps_reference,
            parts_apart=spec.parts_apart,
            rests=placement.take_turns,
        ),
    )


def _lora(learner: LearnerConfig | None) -> int | None:
    return learner.lora.rank if learner is not None and learner.lora is not None else None


def _latent_channels(spec: PolicySpec) -> int:
    return spec.latent.tasks * spec.latent.rank if spec.latent is not None else 0


def _format(learner: LearnerConfig | None, placement: Placement) -> Dtype:
    return number_format(learner.dtype if learner is not None else "auto", placement.device)
