"""The M-step's loss: importance-weighted negative log-likelihood of the tokens that the model itself wrote.

For a batch B of trajectories with weights w_k and n_k trained tokens each,

    L = - sum_{k in B} v_k sum_{t in mask_k} log p(token_t | tokens before it) / sum_{k in B} n_k
    v_k = w_k * (sum n / sum w n)        both sums over the whole iteration

so the average weight of a token is 1 over the iteration, and a batch of failures stays small instead of
being scaled up. Both sums of L run over all ranks and micro-batches: the value does not depend on packing
or sharding.

A loss is a function of the target tokens' log-probabilities and of per-token constants that the packed
batch carries. `token_logprobs` serves every such loss; a preference or clipped-ratio loss is one more
file beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOGIT_CHUNK_BYTES = 128 << 20
"""Largest float32 temporary of `token_logprobs`."""


def iteration_weights(weights: Sequence[float], num_tokens: Sequence[int]) -> list[float]:
    """v_k of every example of an iteration, from its weight w_k >= 0 and its number of trained tokens n_k.

    sum(v n) == sum(n) unless nothing has weight: then every v_k is 0, and the caller has nothing to train on.

    Raises:
        ValueError: a weight is negative, infinite or NaN, or the lengths differ.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    n = torch.tensor(num_tokens, dtype=torch.float64)
    if w.shape != n.shape:
        raise ValueError(f"{len(w)} weights for {len(n)} examples")
    if not torch.isfinite(w).all() or (w < 0).any():
        bad = [(k, weight) for k, weight in enumerate(weights) if not 0 <= weight < float("inf")]
        raise ValueError(f"importance weights must be finite and not negative; (example, weight): {bad[:5]}")
    if not (w * n).any():
        return [0.0] * len(w)
    w = w / w[n > 0].max()  # likelihoods as small as 1e-300 would otherwise under- or overflow
    return (w * (n.sum() / (w * n).sum())).tolist()


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target], in float32 or better.

    The float32 copy of the logits exists only in chunks of `LOGIT_CHUNK_BYTES`, forward and backward, so
    bfloat16 logits over a large vocabulary do not grow to their float32 size.

    Args:
        logits: [T, V], any floating type.
        targets: [T], integer.

    Returns:
        [T], float32 (float64 for float64 logits).
    """
    return _TokenLogprobs.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]


def weighted_nll(logprobs: Tensor, token_weights: Tensor, normaliser: float) -> Tensor:
    """This micro-batch's share of L: -sum(v_t log p_t) / normaliser.

    The sum of the shares over all micro-batches and ranks of an optimiser step is L.

    Args:
        logprobs: [T], log-probability of each target token.
        token_weights: [T], v_k of the example that the token belongs to.
        normaliser: sum of n_k over the whole batch B, zero-weight examples included.
    """
    return -(logprobs * token_weights).sum() / normaliser


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        picked = logits.gather(-1, targets[:, None]).squeeze(-1).to(dtype)
        chunks = logits.split(_rows_per_chunk(logits))
        normalisers = torch.cat([chunk.to(dtype).logsumexp(-1) for chunk in chunks])
        ctx.save_for_backward(logits, targets, normalisers)
        return picked - normalisers

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """d log p(target) / d logits = onehot(target) - softmax(logits)."""
        logits, targets, normalisers = ctx.saved_tensors
        (grad,) = grad_outputs
        rows = _rows_per_chunk(logits)
        grad_logits = torch.empty_like(logits)
        parts = [x.split(rows) for x in (grad_logits, logits, targets, normalisers, grad)]
        for out, chunk, target, normaliser, g in zip(*parts, strict=True):
            softmax = (chunk.to(normaliser.dtype) - normaliser[:, None]).exp_()
            softmax.mul_(-g[:, None]).scatter_add_(-1, target[:, None], g[:, None])
            out.copy_(softmax)
        return grad_logits, None


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, LOGIT_CHUNK_BYTES // (4 * logits.shape[-1]))
