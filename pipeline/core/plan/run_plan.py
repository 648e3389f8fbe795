"""A plan as a whole, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.disk import DiskNeeds
from pipeline.core.plan.machine import Node, Nodes
from pipeline.core.plan.memory import gib
from pipeline.core.plan.needs import Layout, PolicyNeeds, Use, gpu_uses, host_uses
from pipeline.core.plan.work import PhaseWork, Trajectory

NEARLY_FULL = 0.95
"""Ray ends processes of a host that is fuller."""
MOSTLY_IDLE = 0.5
"""Devices that work for less than this share of the time are pointed out."""
SAVES_GPU_MEMORY = (
    "lower learner.tokens_per_microbatch or rollout.gpu_memory_utilization, use learner.zero_stage=3, "
    "learner.gradient_checkpointing=true, learner.offload_optimizer=true or cluster.take_turns=true, train adapters "
    "alone (learner.lora.rank=64), or take more ranks"
)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will need, and the machines that it is to run on.

    Attributes:
        phases: empty where nothing is known of the recipe.
        iterations: of the recipe.
    """

    nodes: Nodes
    layout: Layout
    policies: tuple[PolicyNeeds, ...]
    retrievers: int
    trajectory: Trajectory
    disk: DiskNeeds
    phases: tuple[PhaseWork, ...]
    iterations: int
    assumptions: Assumptions

    def gpus(self) -> list[Use]:
        """What GPUs have to hold."""
        return gpu_uses(self.policies, self.layout)

    def hosts(self) -> list[Use]:
        """What the memory of each node has to hold."""
        return host_uses(self.policies, self.layout, self.retrievers)

    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.all_seconds - phase.hidden_seconds for phase in self.phases)

    def refusals(self) -> list[str]:
        """What cannot be; empty if the run fits."""
        return [
            *_of_caches(self.policies),
            *(line for use in self.gpus() for line in _of_gpu(use, self.nodes[0])),
            *(
                line
                for use, node in zip(self.hosts(), self.nodes, strict=True)
                for line in _of_host(use, node)
            ),
        ]

    def warnings(self) -> list[str]:
        """What will work badly."""
        return [
            *_of_small_caches(self.policies, self.trajectory),
            *(
                line
                for use, node in zip(self.hosts(), self.nodes, strict=True)
                for line in _of_full_host(use, node)
            ),
            *self._of_idle_devices(),
        ]

    def check(self) -> None:
        """
        Raises:
            UserError: the run does not fit.
        """
        if refusals := self.refusals():
            raise UserError("this run does not fit:\n" + "\n".join(f"  {line}" for line in refusals))

    def as_json(self) -> dict[str, Any]:
        """Everything, with what was concluded from it."""
        return {
            **asdict(self),
            "assumptions": self.assumptions.model_dump(),
            "gpus": [asdict(use) for use in self.gpus()],
            "hosts": [asdict(use) for use in self.hosts()],
            "seconds": self.seconds(),
            "refusals": self.refusals(),
            "warnings": self.warnings(),
        }

    def _of_idle_devices(self) -> Iterator[str]:
        if self.layout.shared or self.layout.device == "cpu":
            return
        whole = self.seconds()
        works = {
            who: sum(phase.all_seconds for phase in self.phases if phase.trains == trains)
            for who, trains in (("engines", False), ("learner ranks", True))
        }
        for who, seconds in works.items():
            if whole and seconds / whole < MOSTLY_IDLE:
                yield (
                    f"the GPUs of the {who} are idle for {1 - seconds / whole:.0%} of the time, while the others work; "
                    "cluster.colocate=yes lets engines and ranks share all of them, em.asynchronous=true lets both "
                    "work at once"
                )


def _of_caches(policies: Sequence[PolicyNeeds]) -> Iterator[str]:
    for policy in policies:
        if policy.engine is None:
            continue
        cache = policy.engine.cache
        if cache.bytes < cache.request_bytes:
            yield (
                f"an engine of {policy.name} has {gib(max(0, cache.bytes))} for keys and values, and one request of "
                f"model.max_length tokens takes {gib(cache.request_bytes)}; lower model.max_length, or give it more "
                "(rollout.kv_cache_gib on CPUs, rollout.gpu_memory_utilization or tensor_parallel_size on GPUs)"
            )


def _of_small_caches(policies: Sequence[PolicyNeeds], one: Trajectory) -> Iterator[str]:
    for policy in policies:
        if policy.engine is None or policy.engine.cache.bytes < policy.engine.cache.request_bytes:
            continue
        tokens = policy.engine.cache.tokens
        if tokens < policy.concurrency * one.mean_context:
            yield (
                f"the KV cache of an engine of {policy.name} holds {tokens:,} tokens, "
                f"{tokens // policy.concurrency:,} for each of rollout.concurrency={policy.concurrency} agents, which "
                f"hold {one.mean_context:,.0f} on average and {one.total:,.0f} at their end: prefixes will be evicted "
                f"between turns and computed again; rollout.concurrency={max(1, int(tokens / one.mean_context))} fits"
            )


def _of_gpu(use: Use, node: Node) -> Iterator[str]:
    if use.bytes > node.gpu_memory:
        yield (
            f"{use.what}: {gib(use.bytes)} of {gib(node.gpu_memory)} ({_largest(use)}); {SAVES_GPU_MEMORY}"
        )


def _of_host(use: Use, node: Node) -> Iterator[str]:
    if node.memory and use.bytes > node.memory:
        yield (
            f"{use.what}: {gib(use.bytes)} of memory are needed, it has {gib(node.memory)} ({_largest(use)}); lower "
            "rollout.workers, learner.num_ranks, rollout.kv_cache_gib or learner.tokens_per_microbatch, use "
            "learner.gradient_checkpointing=true, or a smaller model"
        )


def _of_full_host(use: Use, node: Node) -> Iterator[str]:
    if node.memory and NEARLY_FULL * node.memory < use.bytes <= node.memory:
        yield (
            f"{use.what}: {gib(use.bytes)} of {gib(node.memory)} of memory will be used ({_largest(use)}), and above "
            f"{NEARLY_FULL:.0%} Ray ends processes"
        )
    elif node.free_memory is not None and node.free_memory < use.bytes <= node.memory:
        yield (
            f"{use.what}: {gib(use.bytes)} of memory will be used, and {gib(node.free_memory)} of {gib(node.memory)} "
            "are free now; end what holds the rest before the run starts"
        )


def _largest(use: Use) -> str:
    parts = sorted(use.parts, key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {gib(size)}" for name, size in parts)
