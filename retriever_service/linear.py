"""Linear layers of models on CPUs in float32, by oneDNN.

torch takes MKL for products of float32, which has its fastest kernels for processors of one maker only, and oneDNN for
those of bfloat16. vLLM's engines on CPUs take oneDNN for both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEPT_KERNELS = 64
"""Kernels that oneDNN keeps, half a megabyte each: it makes some for every number of rows that it meets, and would keep
a thousand."""


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose products, those of the backward pass too, are oneDNN's. Made by `use_onednn`."""

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


def use_onednn(model: nn.Module) -> None:
    """Let every `nn.Linear` of a model on a CPU compute by oneDNN, where this build of torch has it.

    To be called before this process has computed anything by oneDNN: then it keeps no more than `KEPT_KERNELS`.

    Args:
        model: its parameters, names and hooks stay. Layers of derived classes are left alone, and those that are not in
            float32: torch has oneDNN compute these anyway.
    """
    if not torch.backends.mkldnn.is_available():
        return
    # Its own, and torch's of it; both are made with the first product.
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    with environment_defaults(dict.fromkeys(caches, str(KEPT_KERNELS))):
        _product(torch.ones(8, 8), torch.ones(8, 8))
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = OneDnnLinear


@contextmanager
def environment_defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """In the block, those that the environment has not: for libraries that read them with their first product only.

    Processes that are started from this one are to decide for themselves.
    """
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; what torch's own compiler calls for it."""
    if x.numel() == 0:  # oneDNN refuses
        return nn.functional.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
