"""What each GPU and each host has to hold, from what engines and ranks hold and who shares what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from pipeline.core.plan.engine import EngineNeeds
from pipeline.core.plan.memory import ACCELERATOR_CONTEXT, GIB, Device, Memory
from pipeline.core.plan.shape import ModelShape

SHARED_PROCESSES = int(1.3 * GIB)
"""Of driver and weighting actor. An estimate."""
RETRIEVER = GIB // 2
"""Of a retriever actor, without its encoder and index, of which nothing is known here. An estimate."""
ASLEEP = ("libraries",)
"""What an engine on CPUs keeps while a learner trains."""
AT_REST = ("weights", "reference", "master copy", "Adam", "gradients", "libraries")
"""What a rank on CPUs keeps while engines sample."""


@dataclass(frozen=True, slots=True)
class PolicyNeeds:
    """One policy: its model, its engines and its ranks, all alike.

    Attributes:
        engine, rank: None where there are none.
        tensor_parallel: GPUs of an engine.
        concurrency: agents in flight per engine.
        resting_bytes: on the GPU of a rank that does not train: its weights, and CUDA's own.
        push_bytes: that each engine gets in a push; 0 without a learner or engines.
    """

    name: str
    model: str
    shape: ModelShape
    engines: int
    engine: EngineNeeds | None
    tensor_parallel: int
    concurrency: int
    ranks: int
    rank: Memory | None
    resting_bytes: int
    push_bytes: int
    transport: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """An engine or a rank on a node."""

    policy: str
    kind: str
    """engine or rank"""
    number: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Who is where.

    Attributes:
        shared: engines and ranks are on the same devices.
        take_turns: and give them to each other.
        nodes: tenants of each node.
    """

    device: Device
    shared: bool
    take_turns: bool
    nodes: tuple[tuple[Tenant, ...], ...]


@dataclass(frozen=True, slots=True)
class Use:
    """What a GPU, or a host, holds at some time. `parts` are those of the tenant that needs most of it."""

    what: str
    bytes: int
    parts: tuple[tuple[str, int], ...]


def gpu_uses(policies: Sequence[PolicyNeeds], layout: Layout) -> list[Use]:
    """The fullest GPU of each kind, at each time."""
    if layout.device == "cpu":
        return []
    engines = {p.name: p.engine.memory for p in policies if p.engine is not None}
    ranks = {p.name: p.rank for p in policies if p.rank is not None}
    if not layout.shared:
        uses = [_use(f"GPU of an engine of {name}", [held]) for name, held in engines.items()]
        return uses + ([_use("GPU of a learner rank", list(ranks.values()))] if ranks else [])
    everyone = [*engines.values(), *ranks.values()]
    if not layout.take_turns:
        return [_use("GPU that engines and learner share", everyone)]
    resting = {p.name: p.resting_bytes for p in policies}
    sampling = _use("GPU while engines sample", list(engines.values()), sum(resting[name] for name in ranks))
    # A sleeping engine keeps CUDA's own memory.
    asleep = len(engines) * ACCELERATOR_CONTEXT
    training = [
        _use(
            f"GPU while {name} is trained",
            [held],
            asleep + sum(resting[other] for other in ranks if other != name),
        )
        for name, held in ranks.items()
    ]
    return [sampling, *training]


def host_uses(policies: Sequence[PolicyNeeds], layout: Layout, retrievers: int) -> list[Use]:
    """Of each node, when it is fullest. Where CPUs take turns, engines and ranks have not all of theirs at a time."""
    moments = _moments(policies, layout)
    return [
        max((_of_host(number, held, layout, retrievers) for held in moments), key=attrgetter("bytes"))
        for number in range(len(layout.nodes))
    ]


def _moments(policies: Sequence[PolicyNeeds], layout: Layout) -> list[dict[tuple[str, str], Memory]]:
    """What engines and ranks of each policy hold: while engines sample, and while each policy is trained."""
    engines = {(p.name, "engine"): p.engine.memory for p in policies if p.engine is not None}
    ranks = {(p.name, "rank"): p.rank for p in policies if p.rank is not None}
    if layout.device == "gpu" or not layout.take_turns:
        return [engines | ranks]
    asleep = {who: held.only(*ASLEEP) for who, held in engines.items()}
    at_rest = {who: held.only(*AT_REST) for who, held in ranks.items()}
    return [engines | at_rest, *(asleep | at_rest | {who: held} for who, held in ranks.items())]


def _of_host(number: int, held: Mapping[tuple[str, str], Memory], layout: Layout, retrievers: int) -> Use:
    here = Counter((tenant.policy, tenant.kind) for tenant in layout.nodes[number])
    shares = [
        (f"{count} x {kind} of {policy}", count * held[policy, kind].on("host"))
        for (policy, kind), count in here.items()
    ]
    own = -(-retrievers // len(layout.nodes)) * RETRIEVER + (SHARED_PROCESSES if number == 0 else 0)
    parts = (*shares, ("driver, weighting, retriever", own))
    return Use(f"host {number}", sum(size for _, size in parts), parts)


def _use(what: str, tenants: Sequence[Memory], further: int = 0) -> Use:
    largest = max(tenants, key=lambda held: held.on("gpu"))
    parts = tuple((part.name, part.bytes) for part in largest.components if part.where == "gpu")
    rest = sum(held.on("gpu") for held in tenants) - largest.on("gpu") + further
    return Use(what, largest.on("gpu") + rest, (*parts, *([("others at that time", rest)] if rest else [])))
