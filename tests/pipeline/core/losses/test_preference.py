"""Preference losses against plain formulas, whole and split into packed batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.core.losses.preference import cpo, dpo, sequence_logprobs, simpo

LENGTHS = torch.tensor([3, 5, 1, 4, 2, 6])  # chosen, rejected, chosen, ...
REFERENCE = torch.tensor([-2.0, -4.5, -1.0, -3.0, -2.5, -5.0], dtype=torch.float64)
BETA, GAMMA = 0.3, 0.5


def share(name: str, logprobs: Tensor, first: int, last: int) -> Tensor:
    """The share of examples first to last (excluded), out of all 3 pairs."""
    lengths = LENGTHS[first:last]
    sums = sequence_logprobs(logprobs, torch.arange(last - first).repeat_interleave(lengths), last - first)
    chosen, rejected, reference = sums[0::2], sums[1::2], REFERENCE[first:last]
    if name == "dpo":
        return dpo(chosen, rejected, reference[0::2], reference[1::2], beta=BETA, num_pairs=3)
    if name == "cpo":
        return cpo(chosen, rejected, beta=BETA, num_pairs=3)
    return simpo(chosen, rejected, lengths[0::2], lengths[1::2], beta=BETA, gamma=GAMMA, num_pairs=3)


def plain(name: str, logprobs: Tensor) -> Tensor:
    answers = logprobs.split(LENGTHS.tolist())
    terms = []
    for c in (0, 2, 4):
        value: Callable[[int], Tensor] = {
            "dpo": lambda i: answers[i].sum() - REFERENCE[i],
            "cpo": lambda i: answers[i].sum(),
            "simpo": lambda i: answers[i].mean(),
        }[name]
        margin = BETA * (value(c) - value(c + 1)) - (GAMMA if name == "simpo" else 0)
        terms.append(torch.log(1 + torch.exp(-margin)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["dpo", "cpo", "simpo"])
@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6), (0, 2, 4, 6)])
def test_value_and_gradient_are_those_of_the_plain_formula_for_any_packing(
    name: str, cuts: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    logprobs = -torch.rand(int(LENGTHS.sum()), dtype=torch.float64)
    ours, expected = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for first, last in itertools.pairwise(cuts):
        begin, end = int(LENGTHS[:first].sum()), int(LENGTHS[:last].sum())
        total = total + share(name, ours[begin:end], first, last)
    reference = plain(name, expected)
    total.backward()
    reference.backward()
    assert total.item() == pytest.approx(reference.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=0)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    value = dpo(REFERENCE[0::2], REFERENCE[1::2], REFERENCE[0::2], REFERENCE[1::2], beta=BETA, num_pairs=3)
    assert value.item() == pytest.approx(math.log(2))
