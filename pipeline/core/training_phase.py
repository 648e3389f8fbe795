"""How far one phase of training has come: what a checkpoint from its middle keeps, and what a report is made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.core.losses.joint import Joint
from pipeline.core.losses.loss import Loss
from pipeline.core.records import Example


@dataclass
class Phase:
    """A phase of training, up to its last optimiser step.

    Attributes:
        key: fingerprint; a checkpoint from the middle of a phase is of use to this very phase only.
        history: one dictionary of metrics per step. A step that was skipped has a `grad_norm` that is not finite.
        seconds: that the steps of the history took, whichever processes ran them.
        resumed_at: steps that came out of a checkpoint.
        problems: what was wrong with checkpoints that were passed over then.
    """

    key: str
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def applied(self) -> list[dict[str, float]]:
        """The steps that changed the weights."""
        return [step for step in self.history if math.isfinite(step["grad_norm"])]

    @property
    def skipped(self) -> int:
        return len(self.history) - len(self.applied)

    def averages(self) -> dict[str, float]:
        """Means over the applied steps, of all but the gradient's norm by what a step's normaliser counts.

        A step in which nothing was computed has no metrics of the loss's own, and takes no part in their means.
        """
        if not (applied := self.applied):
            return {"loss": math.nan, "grad_norm": math.nan}
        others = ("tokens", "grad_norm", "learning_rate")
        means = {}
        for name in dict.fromkeys(name for step in applied for name in step if name not in others):
            steps = [step for step in applied if name in step]
            sizes = [step["tokens"] for step in steps]
            means[name] = float(np.average([step[name] for step in steps], weights=sizes))
        return {**means, "grad_norm": float(np.average([step["grad_norm"] for step in applied]))}


def phase_key(examples: Sequence[str], loss: Loss | Joint, *settings: float) -> str:
    """Fingerprint of a phase: digests of its examples, its loss and the settings that its steps depend on."""
    return hashlib.sha256(repr((examples, loss, settings)).encode()).hexdigest()


def digest_of(examples: Iterable[Example]) -> str:
    """Changes when any of these examples does."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id} {example.unit} {example.role}".encode())
        digest.update(example.token_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
        for name in sorted(example.streams):
            digest.update(name.encode() + example.streams[name].tobytes())
    return digest.hexdigest()
