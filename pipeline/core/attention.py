"""Exact attention over a packed row: each example attends to itself only, at the cost of its own length.

transformers' own sdpa also keeps the examples of a packed row apart (it finds the restarts of
`position_ids`), but through a dense [T, T] mask: the time grows with the square of the row and the causal
kernel is lost. Here, in half precision on a GPU, all examples are one call of torch's variable-length flash
attention; elsewhere every example is one causal call of torch's kernel.

Examples that begin alike are computed once up to where they part (`pipeline.core.prefixes`): a kernel gets the whole
sequences, put together from the tokens of the row.

Causal attention and sliding windows are all that these kernels know. What else a model asks for is refused; of most
models that is found out before anything starts (`attention_check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.core.errors import UserError
from pipeline.core.prefixes import Branches, Runs

PACKED = "packed"
"""Name for transformers' `attn_implementation`, known once this module is imported."""
EAGER_INSTEAD = "set learner.attention=eager (slow, and its memory grows with the square of a row)"
WINDOW_ROWS = 256
"""Tokens beside each other of which `per_segment` computes a sliding window at a time."""
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
    branches: Branches | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface; `segment_lengths` comes through the model's forward.

    Args:
        query: [1, heads, T, d]; key and value: [1, kv_heads, T, d].
        attention_mask: None, since transformers makes none for an implementation without a mask function.
        segment_lengths: tokens of each sequence: of each example of the row, sum T.
        branches: how the sequences come from the T tokens, where some of these are in several of them.
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
    if branches is None:
        return kernel(query, key, value, segment_lengths, scaling, dropout, sliding_window), None
    query, key, value = (_pieces(x, branches.runs, 2) for x in (query, key, value))
    output = kernel(query, key, value, segment_lengths, scaling, dropout, sliding_window)
    return _pieces(output, branches.places, 1), None


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
    """Calls of torch's kernel for each segment, on any device. Arguments and result as `packed_attention`.

    A segment that is longer than the window has several, each without what lies outside the window of all its tokens:
    the kernel would compute that too, and mask it.
    """
    blocks = _blocks(segment_lengths, sliding_window)
    if len(blocks) > len(segment_lengths):  # what they see overlaps
        key, value = (_pieces(x, tuple((b.start, b.end) for b in blocks), 2) for x in (key, value))
    seen = [block.end - block.start for block in blocks]
    parts = query.split([block.rows for block in blocks], 2), key.split(seen, 2), value.split(seen, 2)
    outputs = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if block.causal else _window_mask(block.rows, k.shape[2], q.device),
            dropout_p=dropout,
            is_causal=block.causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for block, q, k, v in zip(blocks, *parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _Block(NamedTuple):
    """One call of a kernel: the last `rows` tokens of a row's `start` to `end`, and what they see."""

    rows: int
    start: int
    end: int
    causal: bool
    """Each sees all before it, else as many as the first, which sees from `start` on."""


def _blocks(segment_lengths: tuple[int, ...], sliding_window: int | None) -> list[_Block]:
    """In the order of the tokens. Only what a window cuts is in several."""
    blocks, first = [], 0
    for length in segment_lengths:
        whole = length if sliding_window is None else min(sliding_window, length)
        blocks.append(_Block(whole, first, first + whole, causal=True))
        for start in range(whole, length, WINDOW_ROWS):
            rows = min(WINDOW_ROWS, length - start)
            end = first + start + rows
            blocks.append(_Block(rows, end - rows - whole + 1, end, causal=False))
        first += length
    return blocks


def _pieces(x: Tensor, runs: Runs, dim: int) -> Tensor:
    """These pieces of x along a dimension, end to end."""
    return _Pieces.apply(x, runs, dim)  # type: ignore[no-any-return, no-untyped-call]


class _Pieces(torch.autograd.Function):
    """By slices: torch adds up the gradients of an index in an order of its own on GPUs, and one by one on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Runs, dim: int) -> Tensor:
        ctx.runs, ctx.dim, ctx.length = runs, dim, x.shape[dim]
        return torch.cat([x.narrow(dim, start, end - start) for start, end in runs], dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.length
        total = grad.new_zeros(shape)
        sizes = [end - start for start, end in ctx.runs]
        for (start, _), piece in zip(ctx.runs, grad.split(sizes, ctx.dim), strict=True):
            total.narrow(ctx.dim, start, piece.shape[ctx.dim]).add_(piece)
        return total, None, None


@lru_cache(maxsize=4)  # every layer of a forward pass asks for the same one
def _segment_starts(segment_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32[segments + 1]: where each segment begins, and the end of the last."""
    return torch.tensor(list(accumulate(segment_lengths, initial=0)), dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _window_mask(rows: int, seen: int, device: torch.device) -> Tensor:
    """bool[rows, seen]: the last rows of so many tokens see as many as the first of them, each up to itself."""
    last = seen - rows + torch.arange(rows, device=device)[:, None]
    distance = last - torch.arange(seen, device=device)[None, :]
    return (distance >= 0) & (distance <= seen - rows)


AttentionInterface.register(PACKED, packed_attention)
