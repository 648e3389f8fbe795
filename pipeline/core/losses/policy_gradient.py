"""The clipped-ratio policy gradient (PPO, GRPO) and its value loss, as sums over tokens.

Divided by the number of target tokens of the whole optimiser step: the sum of the shares of all micro-batches and
ranks does not depend on packing. Advantages have any sign; where they come from (a critic, a group) is not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float, normaliser: float
) -> Tensor:
    """-sum min(r A, clamp(r, 1 - clip, 1 + clip) A) / normaliser, r = p / p_old (Schulman et al. 2017, eq. 7).

    Args:
        logprobs, old_logprobs, advantages: [M], one per target token.
        normaliser: target tokens of the whole optimiser step.
    """
    ratio = (logprobs - old_logprobs).exp()
    clamped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clamped * advantages).sum() / normaliser


def sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, *, normaliser: float) -> Tensor:
    """sum(r - log r - 1) / normaliser with r = p_ref / p: GRPO's estimate of KL(p, p_ref) (Shao et al. 2024, eq. 4).

    Args:
        logprobs, ref_logprobs: [M], of tokens that the policy sampled.
    """
    log_ratio = ref_logprobs - logprobs
    return (log_ratio.exp() - log_ratio - 1).sum() / normaliser


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float, normaliser: float
) -> Tensor:
    """sum max((v - R)^2, (v_old + clamp(v - v_old, -clip, clip) - R)^2) / 2 normaliser. All tensors are [M]."""
    clamped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (clamped - returns) ** 2).sum() / (2 * normaliser)
