"""The clipped ratio, its KL and value loss against plain formulas, whole and split into packed batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.core.losses.policy_gradient import clipped_ratio, clipped_value, sampled_kl

CLIP = 0.2
NUM_TOKENS = 12


def share(name: str, x: Tensor, old: Tensor, other: Tensor) -> Tensor:
    if name == "ratio":
        return clipped_ratio(x, old, other, clip=CLIP, normaliser=NUM_TOKENS)
    if name == "kl":
        return sampled_kl(x, old, normaliser=NUM_TOKENS)
    return clipped_value(x, old, other, clip=CLIP, normaliser=NUM_TOKENS)


def plain(name: str, x: float, old: float, other: float) -> tuple[float, float]:
    """Value and derivative of one token's term, case by case."""
    if name == "kl":
        return math.exp(old - x) - (old - x) - 1, 1 - math.exp(old - x)
    if name == "ratio":
        ratio = math.exp(x - old)
        if other > 0 and ratio > 1 + CLIP:
            return -(1 + CLIP) * other, 0.0
        if other < 0 and ratio < 1 - CLIP:
            return -(1 - CLIP) * other, 0.0
        return -ratio * other, -ratio * other
    near = old + max(-CLIP, min(CLIP, x - old))
    if (near - other) ** 2 > (x - other) ** 2:
        return (near - other) ** 2 / 2, 0.0
    return (x - other) ** 2 / 2, x - other


@pytest.mark.parametrize("name", ["ratio", "kl", "value"])
@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 4, 9, 12)])
def test_value_and_gradient_are_those_of_the_plain_formula_for_any_packing(
    name: str, cuts: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    x = (torch.randn(NUM_TOKENS, dtype=torch.float64) - 1).requires_grad_()
    old = x.detach() + 0.5 * torch.randn(NUM_TOKENS, dtype=torch.float64)
    other = torch.randn(NUM_TOKENS, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.pairwise(cuts):
        total = total + share(name, x[a:b], old[a:b], other[a:b])
    total.backward()
    terms = [plain(name, *t) for t in zip(x.tolist(), old.tolist(), other.tolist(), strict=True)]
    assert total.item() == pytest.approx(sum(t[0] for t in terms) / NUM_TOKENS, abs=1e-6)
    gradient = torch.tensor([t[1] for t in terms], dtype=torch.float64) / NUM_TOKENS
    torch.testing.assert_close(x.grad, gradient, atol=1e-5, rtol=0)
