"""Tokens and time of the phases of an iteration, under named assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.config import AgentConfig
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.memory import BYTES, Dtype
from pipeline.core.plan.shape import ModelShape

TERA, GIGA = 1e12, 1e9

ORDERING_TOKENS = 5
"""Of a selection, for each passage that it names: number, brackets and what is between. An estimate."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An average one, in tokens."""

    total: float
    written: float
    """By the model."""

    @property
    def trained_share(self) -> float:
        return self.written / self.total

    @property
    def mean_context(self) -> float:
        """What it holds in the cache, averaged over its life: about half of what it holds at its end."""
        return self.total / 2


def trajectory(agent: AgentConfig, assumed: Assumptions) -> Trajectory:
    """Prompt; of each search a sub-query, its passages and, where the model selects and records, the names of the best
    and the evidence; and the answer."""
    assert assumed.prompt_tokens is not None and assumed.passage_tokens is not None
    assert assumed.turn_tokens is not None
    searches = (assumed.searches or 0.0) if agent.search else 0.0
    turns = searches * (agent.think + agent.record) + 1
    named = min(agent.selected_documents, agent.documents) if agent.select else 0
    written = turns * assumed.turn_tokens + searches * named * ORDERING_TOKENS
    shown = searches * agent.documents * assumed.passage_tokens
    return Trajectory(assumed.prompt_tokens + shown + written, written)


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """One phase: tokens that are computed, and how long that takes."""

    name: str
    tokens: float
    seconds: float
    times: int = 1
    """It happens in a run."""
    trains: bool = False
    """The learner works, and not the engines."""
    hidden_seconds: float = 0.0
    """Of all times together those that another phase takes anyway, beside which this one goes on."""

    @property
    def all_seconds(self) -> float:
        """Of all times, hidden ones included."""
        return self.seconds * self.times


def sampling_seconds(
    shape: ModelShape,
    one: Trajectory,
    assumed: Assumptions,
    *,
    trajectories: int,
    engines: int,
    devices: int,
    concurrency: int,
    dtype: Dtype,
    token_bytes: int,
) -> float:
    """Of trajectories on engines of some devices (GPUs or cores) each, with every token computed once (prefix cache).

    What others write is computed in bulk: 2F operations a token at `prefill_mfu`. What the model writes comes token by
    token: a step of all agents in flight reads the weights, and keys and values of what each holds, or computes 2F
    operations for each of them, whichever takes longer.
    """
    assert assumed.peak_tflops is not None and assumed.bandwidth_gb_s is not None
    per_engine = trajectories / engines
    agents = min(concurrency, per_engine) or 1
    compute = devices * assumed.peak_tflops * TERA
    bandwidth = devices * assumed.bandwidth_gb_s * GIGA * assumed.bandwidth_use
    read = (one.total - one.written) * 2 * shape.parameters / (compute * assumed.prefill_mfu)
    bytes_of_step = BYTES[dtype] * shape.parameters + agents * one.mean_context * token_bytes
    step = max(bytes_of_step / bandwidth, agents * 2 * shape.parameters / (compute * assumed.mfu))
    return per_engine * (read + one.written * step / agents)


def training_seconds(
    shape: ModelShape,
    tokens: float,
    assumed: Assumptions,
    *,
    devices: int,
    checkpointing: bool,
    adapters_only: bool,
) -> float:
    """Of so many tokens on all devices (GPUs or cores) together.

    Operations per parameter and token: 2 forward, 2 backward for the activations, 2 for the weights' gradients (none
    of frozen weights), and 2 for a second forward pass under gradient checkpointing.
    """
    assert assumed.peak_tflops is not None
    operations = 4 + (0 if adapters_only else 2) + (2 if checkpointing else 0)
    return operations * shape.parameters * tokens / (devices * assumed.peak_tflops * TERA * assumed.mfu)
