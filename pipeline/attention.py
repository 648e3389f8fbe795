"""Exact attention over a packed row: each example attends to itself only, at the cost of its own length.

transformers' own sdpa also keeps the examples of a packed row apart (it finds the restarts of
`position_ids`), but through a dense [T, T] mask: the time grows with the square of the row and the causal
kernel is lost. Here every example is one causal call of torch's kernel. flash_attention_2 does the same in
one fused call, on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED_SDPA = "packed_sdpa"
"""Name for transformers' `attn_implementation`, known once this module is imported."""


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface; `segment_lengths` comes through the model's forward.

    Args:
        query: [1, heads, T, d]; key and value: [1, kv_heads, T, d].
        attention_mask: unused; transformers makes none for an implementation without a mask function.
        segment_lengths: tokens of each example of the row, sum T.
        sliding_window: a token sees this many tokens including itself. None: all before it.

    Returns:
        [1, T, heads, d], and None in place of the attention weights.
    """
    outputs = []
    for q, k, v in zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True):
        window = _sliding_mask(q.shape[2], sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _sliding_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool mask of a causal window, or None if the window does not cut anything."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
