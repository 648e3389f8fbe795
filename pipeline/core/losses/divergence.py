"""Divergence between the next-token distributions of the policy and of a reference, a mean over the target tokens.

The reference's logits are either *live*, of a frozen model that the learner holds beside its own (`reference`), or
*recorded*: a stream `reference_logits` of a row of V per target token, for small vocabularies or few positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.losses.token_logprobs import rows_per_chunk
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class Divergence:
    """
    Args:
        direction: `forward`, KL(reference || policy), covers all that the reference does; `reverse`, KL(policy ||
            reference), keeps to what it does; `symmetric` is the mean of the two.
        reference: model directory of a live reference; None: recorded logits.
    """

    direction: Literal["forward", "reverse", "symmetric"] = "forward"
    reference: str | None = None

    output: ClassVar[Output] = "logits"
    compares: ClassVar[bool] = False

    @property
    def streams(self) -> Mapping[str, Form]:
        return {} if self.reference is not None else {"reference_logits": "rows"}

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        sizes = [example.num_targets for example in examples]
        return Prepared(sizes=sizes, computed=[size > 0 for size in sizes])

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        reference = outputs.reference
        if reference is None:
            reference = rows.streams["reference_logits"]
        logits, step = outputs.predicted, rows_per_chunk(outputs.predicted)
        if reference.shape != logits.shape:
            raise UserError(
                f"Divergence needs one vocabulary: the reference has logits of {reference.shape[-1]} tokens, "
                f"the policy of {logits.shape[-1]}"
            )
        total = logits.new_zeros((), dtype=torch.float32)
        # Chunks bound the float32 copies of bfloat16 logits.
        for policy, other in zip(logits.split(step), reference.split(step), strict=True):
            total = total + self._summed(_log_softmax(policy), _log_softmax(other))
        return Terms(total / normaliser, {"kl": (total.detach(), len(logits))})

    def _summed(self, p: Tensor, reference: Tensor) -> Tensor:
        match self.direction:
            case "forward":
                return _kl(reference, p)
            case "reverse":
                return _kl(p, reference)
            case "symmetric":
                return (_kl(p, reference) + _kl(reference, p)) / 2


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Summed KL(p || q) of log-probabilities [M, V]."""
    return (p.exp() * (p - q)).sum()
