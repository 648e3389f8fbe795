"""The clipped-ratio policy gradient (PPO, GRPO) and the loss of its critic.

Advantages have any sign; where they come from (a critic, a group) is not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline

MeanOver = Literal["step", "group", "sequence"]
"""Of which tokens a mean is taken. step: of all in an optimiser step. group: of those of each unit, and then of the
units. sequence: of those of each example, and then of the examples."""


@dataclass(frozen=True, slots=True)
class ClippedRatio:
    """-mean min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A), r = p / p_old (Schulman et al. 2017, equation 7; with
    two ranges Yu et al. 2025, equation 8).

    Streams, per token or per example: `advantage`, `old_logprob`, and with a KL term but no live reference
    `reference_logprob`. An example of advantage 0 counts in the means and, without a KL term, is not computed.

    Args:
        clip_low, clip_high: how far r may be below and above 1.
        kl_coefficient: adds it times GRPO's estimate of KL(p, reference), r - log r - 1 with r = p_ref / p (Shao et
            al. 2024, equation 4).
        mean_over: `sequence` is that of GRPO (Shao et al. 2024, equation 3), `group` that of DAPO (Yu et al. 2025,
            equation 8).
        reference: model directory of a live reference for the KL term; None: recorded log-probabilities.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    mean_over: MeanOver = "step"
    reference: str | None = None

    output: ClassVar[Output] = "logprobs"
    compares: ClassVar[bool] = False

    @property
    def streams(self) -> Mapping[str, Form]:
        own: dict[str, Form] = {"advantage": "tokens", "old_logprob": "tokens"}
        is_recorded = self.kl_coefficient > 0 and self.reference is None
        return own | {"reference_logprob": "tokens"} if is_recorded else own

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        tokens = [example.num_targets for example in examples]
        weights = [1 / max(1, total) for total in self._totals(examples)]
        return Prepared(
            sizes=[weight * n for weight, n in zip(weights, tokens, strict=True)],
            computed=[
                n > 0 and (self.kl_coefficient > 0 or not _has_no_advantage(example))
                for example, n in zip(examples, tokens, strict=True)
            ],
            streams={"token_weight": weights},
        )

    def _totals(self, examples: Sequence[Outline]) -> list[int]:
        """Of each example, among how many tokens each of its own counts; 1 where they are told by the normaliser."""
        match self.mean_over:
            case "step":
                return [1] * len(examples)
            case "sequence":
                return [example.num_targets for example in examples]
            case "group":
                totals = Counter[str]()
                for example in examples:
                    totals[example.unit] += example.num_targets
                return [totals[example.unit] for example in examples]

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        logprobs, advantages = outputs.predicted, rows.per_target("advantage")
        ratio = (logprobs - rows.per_target("old_logprob")).exp()
        clamped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantages, clamped * advantages)
        metrics: dict[str, tuple[torch.Tensor, int]] = {"clipped": ((ratio != clamped).sum(), len(ratio))}
        if self.kl_coefficient:
            reference = outputs.reference
            if reference is None:
                reference = rows.per_target("reference_logprob")
            log_ratio = reference - logprobs
            kl = log_ratio.exp() - log_ratio - 1
            losses = losses + self.kl_coefficient * kl
            metrics["kl"] = (kl.detach().sum(), len(ratio))
        return Terms((rows.per_target("token_weight") * losses).sum() / normaliser, metrics)


@dataclass(frozen=True, slots=True)
class ClippedValue:
    """mean max((v - R)^2, (v_old + clamp(v - v_old, -clip, clip) - R)^2) / 2, for a value head.

    Streams, per token or per example: `return`, and with clipping `old_value`.

    Args:
        clip: None for the plain squared error.
    """

    clip: float | None = None

    output: ClassVar[Output] = "values"
    reference: ClassVar[str | None] = None
    compares: ClassVar[bool] = False

    @property
    def streams(self) -> Mapping[str, Form]:
        return {"return": "tokens"} if self.clip is None else {"return": "tokens", "old_value": "tokens"}

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        return _all_tokens(examples)

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        values, returns = outputs.predicted, rows.per_target("return")
        errors = (values - returns) ** 2
        if self.clip is not None:
            old = rows.per_target("old_value")
            clamped = old + (values - old).clamp(-self.clip, self.clip)
            errors = torch.maximum(errors, (clamped - returns) ** 2)
        return Terms(errors.sum() / (2 * normaliser), {"squared_error": (errors.detach().sum(), len(errors))})


def _all_tokens(examples: Sequence[Outline]) -> Prepared:
    sizes = [example.num_targets for example in examples]
    return Prepared(sizes=sizes, computed=[size > 0 for size in sizes])


def _has_no_advantage(example: Outline) -> bool:
    return example.shapes.get("advantage") == (1,) and example.number("advantage") == 0
