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
        averages: over the steps: loss and the loss's own metrics (by what each step's normaliser counts), grad_norm.
            NaN without steps.
        trained_tokens, total_tokens, seconds: of the steps that this process ran.
        pack_fill, rank_balance: see `pipeline.core.packing.packing_efficiency`.
        history: one dictionary per step: loss, the loss's own metrics, tokens (the step's normaliser), grad_norm,
            learning_rate.
    """

    examples: int
    skipped_examples: int
    learning_rate: float
    steps: int
    averages: Mapping[str, float]
    trained_tokens: int
    total_tokens: int
    seconds: float
    pack_fill: float
    rank_balance: float
    history: Sequence[Mapping[str, float]]

    @property
    def trained_tokens_per_s(self) -> float:
        return self.trained_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        return self.total_tokens / self.seconds

    def figures(self) -> dict[str, Any]:
        """All but the history, flat, for the run directory."""
        return {
            "examples": self.examples,
            "skipped_examples": self.skipped_examples,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            **self.averages,
            "trained_tokens": self.trained_tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "trained_tokens_per_s": self.trained_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "pack_fill": self.pack_fill,
            "rank_balance": self.rank_balance,
        }
