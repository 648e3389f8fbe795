"""The weights of the weighted likelihood, and the log-probabilities of tokens that it is made of."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.copies import copies_of, merge_copies
from pipeline.core.losses import token_logprobs as module
from pipeline.core.losses.likelihood import WeightedNll, iteration_weights
from pipeline.core.losses.token_logprobs import token_logprobs
from pipeline.core.records import Example

weight_and_tokens = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(0, 50)), min_size=1, max_size=20
)


@settings(deadline=None)
@given(weight_and_tokens)
def test_iteration_weights_average_one_per_trained_token_and_keep_their_ratios(
    pairs: list[tuple[float, int]],
) -> None:
    weights, tokens = [w for w, _ in pairs], [n for _, n in pairs]
    v = iteration_weights(logs_of(weights), tokens)
    if not any(w * n for w, n in pairs):
        assert v == [0.0] * len(pairs)
        return
    assert sum(a * n for a, n in zip(v, tokens, strict=True)) == pytest.approx(sum(tokens))
    heaviest = max(range(len(pairs)), key=weights.__getitem__)
    for a, w in zip(v, weights, strict=True):
        assert a * weights[heaviest] == pytest.approx(v[heaviest] * w)


def logs_of(weights: list[float]) -> list[float]:
    return [math.log(w) if w else -math.inf for w in weights]


def test_iteration_weights_of_likelihoods_below_every_floating_point_number_keep_their_ratios() -> None:
    v = iteration_weights([-5000.0, -5000.0 + math.log(3), -math.inf], [10, 10, 10])
    assert v == pytest.approx([0.75, 2.25, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        iteration_weights([0.0, bad], [3, 3])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    vocabulary=st.integers(2, 9),
    chunk_rows=st.integers(1, 8),
)
def test_gradient_of_weighted_log_probabilities_is_correct_in_chunks(
    seed: int, rows: int, vocabulary: int, chunk_rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return -(token_logprobs(x, targets) * weights).sum() / 5.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_LOGIT_CHUNK_BYTES", 4 * vocabulary * chunk_rows)
        assert torch.autograd.gradcheck(loss, (logits,))
        reference = -(torch.log_softmax(logits, -1)[torch.arange(rows), targets] * weights).sum() / 5.0
        torch.testing.assert_close(loss(logits), reference)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -1e4]
    logprobs.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(5)
    logprobs = token_logprobs(logits, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.float(), -1)[torch.arange(5), targets])


def weighted(weight: float, targets: int) -> Example:
    ids, mask = np.zeros(targets + 1, dtype=np.int32), np.ones(targets + 1, dtype=np.bool_)
    return Example(f"{weight}", f"{weight}", "policy", ids, mask, {"log_weight": np.array(logs_of([weight]))})


def test_negligible_and_zero_weights_count_in_the_normaliser_and_are_not_computed() -> None:
    examples = [weighted(1.0, 4), weighted(0.0, 3), weighted(1e-4, 2)]
    prepared = WeightedNll(negligible_weight=1e-3).prepare(examples)
    assert list(prepared.sizes) == [4, 3, 2]
    assert list(prepared.computed) == [True, False, False]
    assert list(WeightedNll().prepare(examples).computed) == [True, False, True]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=8)
)
def test_merged_copies_weigh_what_they_did_and_are_negligible_if_they_were(
    rows: list[tuple[float, int, int]],
) -> None:
    apart, merged = [], []
    for k, (weight, targets, count) in enumerate(rows):
        copies = [replace(weighted(weight, targets), id=f"{k}/{n}", unit=str(k)) for n in range(count)]
        apart.append(copies)
        merged += merge_copies(copies)
    loss = WeightedNll(negligible_weight=0.1)
    whole, less = loss.prepare([example for copies in apart for example in copies]), loss.prepare(merged)
    assert sum(less.sizes) == sum(whole.sizes)
    assert [copies_of(example) for example in merged] == [count for _, _, count in rows]
    starts = np.cumsum([0, *(len(copies) for copies in apart)])
    exact = WeightedNll().prepare([example for copies in apart for example in copies]).streams["v"]
    for k, (start, end) in enumerate(pairwise(starts)):
        if abs(exact[start] / 0.1 - 1) > 1e-9:  # not on the limit itself
            assert less.streams["v"][k] == pytest.approx(sum(whole.streams["v"][start:end]))
            assert less.computed[k] == whole.computed[start]
