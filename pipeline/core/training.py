"""What a phase of training comes back with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Figures of one phase of training.

    Attributes:
        examples, skipped_examples: of the phase; the skipped ones count in the normaliser, but are not computed.
        learning_rate: peak.
        steps: optimiser steps.
        skipped_steps: of them those whose gradient was not finite: they changed nothing.
        resumed_at: steps that came out of a checkpoint when the phase was last begun; 0 if it ran through.
        damaged_checkpoints: what was wrong with newer ones, which it did not come out of.
        averages: over the steps that were not skipped: loss and the loss's own metrics (by what each step's normaliser
            counts), grad_norm. NaN without steps.
        trained_tokens, total_tokens: of all steps of the phase.
        seconds: that the steps took, those before a resume included; not the writing of checkpoints, and not what was
            lost with a process and done again.
        pack_fill, rank_balance: see `pipeline.core.packing.packing_efficiency`.
        history: one dictionary per step: loss, the loss's own metrics, tokens (the step's normaliser), grad_norm,
            learning_rate.
    """

    examples: int
    skipped_examples: int
    learning_rate: float
    steps: int
    skipped_steps: int
    resumed_at: int
    damaged_checkpoints: Sequence[str]
    averages: Mapping[str, float]
    trained_tokens: int
    total_tokens: int
    seconds: float
    pack_fill: float
    rank_balance: float
    history: Sequence[Mapping[str, float]]

    @property
    def trained_tokens_per_s(self) -> float:
        return self.trained_tokens / self.seconds if self.seconds else 0.0

    @property
    def total_tokens_per_s(self) -> float:
        return self.total_tokens / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """All but the history, flat, for the run directory."""
        return {
            "examples": self.examples,
            "skipped_examples": self.skipped_examples,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "resumed_at": self.resumed_at,
            "damaged_checkpoints": list(self.damaged_checkpoints),
            **self.averages,
            "trained_tokens": self.trained_tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "trained_tokens_per_s": self.trained_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "pack_fill": self.pack_fill,
            "rank_balance": self.rank_balance,
        }
