"""Losses on pairs of answers, a chosen and a rejected one.

All are sums over the P pairs of a packed batch, divided by the number of pairs of the whole optimiser step: the
sum of the shares of all micro-batches and ranks does not depend on packing, as long as no pair is split.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sequence_logprobs(logprobs: Tensor, example_of_target: Tensor, num_examples: int) -> Tensor:
    """Summed log-probability of each example's target tokens.

    Args:
        logprobs: [M], log-probability of each target token.
        example_of_target: [M], integer, the example that the token belongs to.

    Returns:
        [num_examples]; 0 for an example without targets.
    """
    zeros = torch.zeros(num_examples, dtype=logprobs.dtype, device=logprobs.device)
    return zeros.index_add(0, example_of_target, logprobs)


def dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, num_pairs: int
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    -sum log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))) / num_pairs

    Args:
        chosen, rejected: [P], summed log-probabilities under the trained policy.
        ref_chosen, ref_rejected: [P], the same under the frozen reference.
        num_pairs: pairs of the whole optimiser step.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -logsigmoid(beta * margin).sum() / num_pairs


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float, num_pairs: int) -> Tensor:
    """The preference term of contrastive preference optimisation (Xu et al. 2024): DPO, uniform reference."""
    return -logsigmoid(beta * (chosen - rejected)).sum() / num_pairs


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    gamma: float,
    num_pairs: int,
) -> Tensor:
    """Reference-free margin of average log-probabilities (SimPO, Meng et al. 2024, equation 6).

    Args:
        chosen, rejected: [P], summed log-probabilities.
        chosen_tokens, rejected_tokens: [P], numbers of target tokens, at least 1.
        gamma: the margin that a pair should reach.
        num_pairs: pairs of the whole optimiser step.
    """
    margin = beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma
    return -logsigmoid(margin).sum() / num_pairs
