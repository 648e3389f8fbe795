"""What a policy is, as data: a named model, who samples from it and who trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.config import LearnerConfig, ModelConfig, RolloutConfig
from pipeline.core.latent_tasks import LatentTasks

Head = Literal["lm", "value", "embedding"]
"""What a policy computes: the next token, one scalar a token, or one vector a text."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A named model of a run."""

    name: str
    model: ModelConfig
    """What it starts from. Engines cannot change architecture or tokenizer later."""
    rollout: RolloutConfig | None = None
    """Its engines. None: it is never sampled from."""
    learner: LearnerConfig | None = None
    """Its learner. None: it is frozen, a teacher or a reference: no ranks, no optimiser."""
    head: Head = "lm"
    records_proposal: bool = False
    """Completions carry log q of the distribution that was sampled from instead of log p of the model."""
    keeps_reference: bool = False
    """Its loss asks each rank for a frozen model of its shape as well (`Loss.reference`)."""
    parts_apart: int = 0
    """Its joint loss takes the gradients of so many parts apart (`Joint.project_conflicts`). 0: it does not."""
    latent: LatentTasks | None = None
    """Latent tasks that it is trained with. None: none."""
    seed: int = 0
    """Of adapters and dropout."""

    def __post_init__(self) -> None:
        if self.rollout is None and self.learner is None:
            raise ValueError(f"policy {self.name} has neither engines nor a learner")
        if self.rollout is not None and self.head != "lm":
            raise ValueError(f"policy {self.name} has a head {self.head} and cannot be sampled from")
        if self.latent is not None and self.head != "lm":
            raise ValueError(
                f"policy {self.name} has a head {self.head}, and only a language model has latent tasks"
            )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a policy, on disk."""

    version: int
    model: str
    """Model directory or hub name that engines and others load."""
    state: Path | None = None
    """Checkpoint of the learner. None: training starts from `model` with a fresh optimiser."""
