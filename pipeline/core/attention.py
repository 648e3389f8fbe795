"""Exact attention over a packed row: each example attends to itself only, at the cost of its own length.

transformers' own sdpa also keeps the examples of a packed row apart (it finds the restarts of
`position_ids`), but through a dense [T, T] mask: the time grows with the square of the row and the causal
kernel is lost. Here, in half precision on a GPU, all examples are one call of torch's variable-length flash
attention; elsewhere every example is one causal call of torch's kernel.

Causal attention and sliding windows are all that these kernels know. What else a model asks for is refused; of most
models that is found out before anything starts (`attention_check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.core.errors import UserError

PACKED = "packed"
"""Name for transformers' `attn_implementation`, known once this module is imported."""
EAGER_INSTEAD = "set learner.attention=eager (slow, and its memory grows with the square of a row)"
WITHOUT_EFFECT = frozenset(
    {
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
"""Keywords that models hand on to their attention, and that change nothing of what it computes."""


def packed_attention(
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
    **further: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface; `segment_lengths` comes through the model's forward.

    Args:
        query: [1, heads, T, d]; key and value: [1, kv_heads, T, d].
        attention_mask: None, since transformers makes none for an implementation without a mask function.
        segment_lengths: tokens of each example of the row, sum T.
        sliding_window: a token sees this many tokens including itself. None: all before it.
        further: what a model may ask for beside that.

    Returns:
        [1, T, heads, d], and None in place of the attention weights.

    Raises:
        UserError: the model asks for something else, such as soft-capping, attention sinks or a mask of its own.
    """
    if names := not_known(attention_mask, further):
        raise UserError(
            f"learner.attention: packed cannot compute what {type(module).__name__} asks for ({', '.join(names)}); "
            f"{EAGER_INSTEAD}"
        )
    kernel = varlen if takes_varlen(query, value, dropout) else per_segment
    return kernel(query, key, value, segment_lengths, scaling, dropout, sliding_window), None


def not_known(attention_mask: Tensor | None, further: Mapping[str, Any]) -> list[str]:
    """What of a model's requests `packed_attention` does not compute, by name."""
    names = [name for name, value in further.items() if value is not None and name not in WITHOUT_EFFECT]
    if further.get("is_causal"):  # as everything here
        names.remove("is_causal")
    return [*sorted(names), *(["a mask of its own"] if attention_mask is not None else [])]


def takes_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the variable-length kernel can do it: half precision on a GPU, heads of one size of at most 256 that 8
    divides, no dropout."""
    half, head = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    fits = head == value.shape[-1] and head <= 256 and head % 8 == 0
    return query.is_cuda and half and fits and dropout == 0.0


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """All segments in one call (torch.nn.attention.varlen). Arguments and result as `packed_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    starts = _segment_starts(segment_lengths, query.device)
    longest = max(segment_lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # no auxiliary outputs were asked for
    return output[None]


def per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """One call of torch's kernel per segment, on any device. Arguments and result as `packed_attention`."""
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
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)  # every layer of a forward pass asks for the same one
def _segment_starts(segment_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32[segments + 1]: where each segment begins, and the end of the last."""
    return torch.tensor(list(accumulate(segment_lengths, initial=0)), dtype=torch.int32, device=device)


def _sliding_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool mask of a causal window, or None if the window does not cut anything."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(PACKED, packed_attention)
