"""Divergences against torch.distributions, whole and split into packed batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from pipeline.core.losses.divergence import forward_kl, reverse_kl, symmetric_kl

LOSSES = {"forward": forward_kl, "reverse": reverse_kl, "symmetric": symmetric_kl}


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 2, 7)])
def test_value_and_gradient_are_those_of_the_plain_formula_for_any_packing(
    name: str, cuts: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    logits, reference = torch.randn(2, 7, 5, dtype=torch.float64)
    ours, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.pairwise(cuts):
        total = total + LOSSES[name](ours[a:b], reference[a:b], normaliser=7)
    p, q = Categorical(logits=expected), Categorical(logits=reference)
    forward, reverse = kl_divergence(q, p).mean(), kl_divergence(p, q).mean()
    plain = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[name]
    total.backward()
    plain.backward()
    assert total.item() == pytest.approx(plain.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=0)
