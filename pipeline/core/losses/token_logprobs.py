"""Log-probabilities of given tokens, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_CHUNK_BYTES = 128 << 20
"""Largest float32 temporary of `token_logprobs`."""
CPU_LOGIT_CHUNK_BYTES = 4 << 20
"""The same on a CPU: what its caches hold, and what its allocator does not take from the kernel anew each time."""


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


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        picked = logits.gather(-1, targets[:, None]).squeeze(-1).to(dtype)
        chunks = logits.split(rows_per_chunk(logits))
        normalisers = torch.cat([chunk.to(dtype).logsumexp(-1) for chunk in chunks])
        ctx.save_for_backward(logits, targets, normalisers)
        return picked - normalisers

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """d log p(target) / d logits = onehot(target) - softmax(logits)."""
        logits, targets, normalisers = ctx.saved_tensors
        (grad,) = grad_outputs
        rows = rows_per_chunk(logits)
        grad_logits = torch.empty_like(logits)
        parts = [x.split(rows) for x in (grad_logits, logits, targets, normalisers, grad)]
        for out, chunk, target, normaliser, g in zip(*parts, strict=True):
            softmax = (
                out if out.dtype == normaliser.dtype else torch.empty_like(chunk, dtype=normaliser.dtype)
            )
            torch.sub(chunk, normaliser[:, None], out=softmax).exp_()
            softmax.mul_(-g[:, None]).scatter_add_(-1, target[:, None], g[:, None])
            if softmax is not out:
                out.copy_(softmax)
        return grad_logits, None


def rows_per_chunk(logits: Tensor) -> int:
    most = CPU_LOGIT_CHUNK_BYTES if logits.device.type == "cpu" else LOGIT_CHUNK_BYTES
    return max(1, most // (4 * logits.shape[-1]))
