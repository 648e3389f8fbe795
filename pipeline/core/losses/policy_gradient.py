"""The clipped-ratio policy gradient (PPO, GRPO) and the loss of its critic: means over the tokens of a step.

Advantages have any sign; where they come from (a critic, a group) is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class ClippedRatio:
    """-mean min(r A, clamp(r, 1 - clip, 1 + clip) A), r = p / p_old (Schulman et al. 2017, equation 7).

    Streams, per token or per example: `advantage`, `old_logprob`, and with a KL term `reference_logprob`.

    Args:
        kl_coefficient: adds it times GRPO's estimate of KL(p, reference), r - log r - 1 with r = p_ref / p (Shao et
            al. 2024, equation 4).
    """

    clip: float = 0.2
    kl_coefficient: float = 0.0

    output: ClassVar[Output] = "logprobs"
    reference: ClassVar[str | None] = None
    compares: ClassVar[bool] = False

    @property
    def streams(self) -> Mapping[str, Form]:
        own: dict[str, Form] = {"advantage": "tokens", "old_logprob": "tokens"}
        return own | {"reference_logprob": "tokens"} if self.kl_coefficient else own

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        return _all_tokens(examples)

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        logprobs, advantages = outputs.predicted, rows.per_target("advantage")
        ratio = (logprobs - rows.per_target("old_logprob")).exp()
        clamped = ratio.clamp(1 - self.clip, 1 + self.clip)
        loss = -torch.minimum(ratio * advantages, clamped * advantages).sum() / normaliser
        metrics = {"clipped": ((ratio != clamped).sum(), len(ratio))}
        if self.kl_coefficient:
            log_ratio = rows.per_target("reference_logprob") - logprobs
            kl = (log_ratio.exp() - log_ratio - 1).sum()
            loss = loss + self.kl_coefficient * kl / normaliser
            metrics["kl"] = (kl.detach(), len(ratio))
        return Terms(loss, metrics)


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
