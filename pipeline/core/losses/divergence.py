"""Divergences between the next-token distributions of a policy and of a reference, on chosen positions.

Sums over the M positions, divided by the positions of the whole optimiser step: the sum of the shares of all
micro-batches and ranks does not depend on packing. Logits may be recorded or live; they are float32 or float64.
"""

from __future__ import annotations

from torch import Tensor


def forward_kl(logits: Tensor, ref_logits: Tensor, *, normaliser: float) -> Tensor:
    """sum KL(reference || policy) / normaliser: covers all that the reference does. Logits are [M, V]."""
    return _kl(ref_logits.log_softmax(-1), logits.log_softmax(-1)) / normaliser


def reverse_kl(logits: Tensor, ref_logits: Tensor, *, normaliser: float) -> Tensor:
    """sum KL(policy || reference) / normaliser: keeps to what the reference does. Logits are [M, V]."""
    return _kl(logits.log_softmax(-1), ref_logits.log_softmax(-1)) / normaliser


def symmetric_kl(logits: Tensor, ref_logits: Tensor, *, normaliser: float) -> Tensor:
    """Mean of the forward and the reverse divergence. Logits are [M, V]."""
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (_kl(p, q) + _kl(q, p)) / (2 * normaliser)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Summed KL(p || q) of log-probabilities [M, V]."""
    return (p.exp() * (p - q)).sum()
