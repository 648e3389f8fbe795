"""Attention over packed rows: the variable-length kernel against one call per segment, in value, gradient and time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.gpu.limits import seconds
from bench.gpu.rows import Row, at_least, at_most
from pipeline.core.attention import per_segment, takes_varlen, varlen

SHAPES = {
    "Qwen3-0.6B": (16, 8, 128, None),
    "Qwen2.5-0.5B": (14, 2, 64, None),
    "Gemma 3 270M": (4, 1, 256, 512),
    "heads of 32": (8, 2, 32, None),
}
"""Query heads, key/value heads, head size, sliding window."""
Inputs = tuple[Tensor, Tensor, Tensor]
TOLERANCE = 0.03
"""Relative error (norm of the difference) of bfloat16 against float32 on the same inputs."""


def run(device: str, scratch: Path) -> list[Row]:
    rows = []
    tokens = 16_384 if device == "cuda" else 512
    lengths = segment_lengths(tokens)
    for name, shape in SHAPES.items():
        rows += compare(name, shape, segment_lengths(min(tokens, 2_048)), device)
        if device == "cuda":
            rows += speed(name, shape, lengths)
    return rows


def segment_lengths(tokens: int) -> tuple[int, ...]:
    """Lengths like those of trajectories: from 1/32 to 1/4 of a row, and what is left."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(rng.integers(tokens // 32, tokens // 4)), tokens - sum(lengths)))
    return tuple(lengths)


def compare(
    name: str, shape: tuple[int, int, int, int | None], lengths: tuple[int, ...], device: str
) -> list[Row]:
    """Outputs and gradients against float32, one call per segment."""
    window = shape[3]
    inputs = make_inputs(shape, sum(lengths), device)
    kernel = varlen if takes_varlen(inputs[0], inputs[2], 0.0) else per_segment
    query, key, value = (x.detach().float().requires_grad_() for x in inputs)
    exact = (query, key, value)
    reference = attend(per_segment, exact, lengths, window)
    output = attend(kernel, inputs, lengths, window)
    weight = torch.randn_like(reference)
    (reference * weight).sum().backward()
    (output * weight.to(output.dtype)).sum().backward()
    gradient = max(error(x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))
    what = f"attention {name}: {kernel.__name__}, relative error"
    return [
        at_most(f"{what} of the output", error(output, reference), "", TOLERANCE),
        at_most(f"{what} of the gradient", gradient, "", TOLERANCE),
    ]


def speed(name: str, shape: tuple[int, int, int, int | None], lengths: tuple[int, ...]) -> list[Row]:
    inputs = make_inputs(shape, sum(lengths), "cuda")

    def timed(kernel: Callable[..., Tensor]) -> float:
        return seconds(lambda: attend(kernel, inputs, lengths, shape[3]).sum().backward(), "cuda")

    slow, fast = timed(per_segment), timed(varlen)
    what = f"attention {name}, {len(lengths)} segments in {sum(lengths)} tokens, forward and backward"
    return [
        Row(f"{what}: one call per segment", 1e3 * slow, "ms"),
        at_least(f"{what}: variable-length kernel, times as fast", slow / fast, "x", 1.0),
    ]


def make_inputs(shape: tuple[int, int, int, int | None], tokens: int, device: str) -> Inputs:
    heads, kv_heads, size, _ = shape
    torch.manual_seed(0)

    def random(count: int) -> Tensor:
        return torch.randn(1, count, tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)

    return random(heads), random(kv_heads), random(kv_heads)


def attend(
    kernel: Callable[..., Tensor], inputs: Inputs, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    query, key, value = inputs
    return kernel(query, key, value, lengths, None, 0.0, window)


def error(value: Tensor | None, reference: Tensor | None) -> float:
    """Norm of the difference, relative to that of the reference."""
    assert value is not None and reference is not None
    return float((value.float() - reference).norm() / reference.norm())
