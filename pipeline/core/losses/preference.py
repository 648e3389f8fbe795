"""Losses on pairs: a unit of two examples, one of `label` 1 (chosen) and one of `label` -1 (rejected).

All are means over the pairs of an optimiser step of -log sigmoid of a margin; they differ in the margin. An optional
term, `nll_coefficient` times the mean negative log-likelihood per token of the chosen examples, keeps those likely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class _PairLoss(ABC):
    beta: float
    nll_coefficient: float = 0.0

    output: ClassVar[Output] = "logprobs"
    streams: ClassVar[Mapping[str, Form]] = {"label": "number"}
    reference: ClassVar[str | None] = None
    compares: ClassVar[bool] = True

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        check_pairs(examples)
        # Each member of a pair is half of it.
        return Prepared(
            sizes=[0.5] * len(examples),
            computed=[True] * len(examples),
            streams={"num_targets": [float(example.num_targets) for example in examples]},
        )

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        logprobs, chosen, rejected = rows.sums(outputs.predicted), *_members(rows)
        margins = self.margins(logprobs, rows, chosen, rejected)
        lengths = rows.numbers["num_targets"].clamp(min=1)
        loss = -logsigmoid(margins).sum() / normaliser
        if self.nll_coefficient:
            loss = loss - self.nll_coefficient * (logprobs / lengths)[chosen].sum() / normaliser
        return Terms(
            loss,
            {
                "accuracy": ((margins.detach() > 0).sum(), len(margins)),
                "margin": (margins.detach().sum(), len(margins)),
                "chosen_logprob": (logprobs.detach()[chosen].sum(), len(margins)),
            },
        )

    @abstractmethod
    def margins(self, logprobs: Tensor, rows: Rows, chosen: Tensor, rejected: Tensor) -> Tensor:
        """[P], from the summed log-probabilities [n] of the examples and the positions of the P pairs' members."""


@dataclass(frozen=True, slots=True)
class Dpo(_PairLoss):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7); its NLL term is that of Pang et al. 2024.

    margin = beta ((chosen - its reference) - (rejected - its reference)), summed log-probabilities. Stream:
    `reference_logprob`, that of the whole example under the frozen reference.
    """

    beta: float = 0.1
    streams: ClassVar[Mapping[str, Form]] = {"label": "number", "reference_logprob": "number"}

    def margins(self, logprobs: Tensor, rows: Rows, chosen: Tensor, rejected: Tensor) -> Tensor:
        ratios = logprobs - rows.numbers["reference_logprob"]
        return self.beta * (ratios[chosen] - ratios[rejected])


@dataclass(frozen=True, slots=True)
class Cpo(_PairLoss):
    """Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, and the NLL term."""

    beta: float = 0.1
    nll_coefficient: float = 1.0

    def margins(self, logprobs: Tensor, rows: Rows, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.beta * (logprobs[chosen] - logprobs[rejected])


@dataclass(frozen=True, slots=True)
class SimPo(_PairLoss):
    """Reference-free margin of average log-probabilities (Meng et al. 2024, equation 6).

    margin = beta (chosen / its tokens - rejected / its tokens) - gamma
    """

    beta: float = 2.0
    gamma: float = 0.5

    def margins(self, logprobs: Tensor, rows: Rows, chosen: Tensor, rejected: Tensor) -> Tensor:
        means = logprobs / rows.numbers["num_targets"].clamp(min=1)
        return self.beta * (means[chosen] - means[rejected]) - self.gamma


def check_pairs(examples: Sequence[Outline]) -> None:
    """
    Raises:
        ValueError: a unit that is not one chosen and one rejected example.
    """
    labels: dict[str, list[float]] = {}
    for example in examples:
        labels.setdefault(example.unit, []).append(example.number("label"))
    for unit, found in labels.items():
        if Counter(found) != {1.0: 1, -1.0: 1}:
            raise ValueError(f"unit {unit} must hold a chosen and a rejected example, has the labels {found}")


def _members(rows: Rows) -> tuple[Tensor, Tensor]:
    """Positions of the chosen and of the rejected example of each pair, in the same order."""
    by_unit = torch.argsort(rows.unit, stable=True)
    labels = rows.numbers["label"][by_unit]
    return by_unit[labels > 0], by_unit[labels < 0]
