"""The weighted likelihood: its value, its gradient, and its indifference to how a batch is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.losses import likelihood as losses
from pipeline.core.losses.likelihood import iteration_weights, token_logprobs, weighted_nll

weight_and_tokens = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(0, 50)), min_size=1, max_size=20
)


@settings(deadline=None)
@given(weight_and_tokens)
def test_iteration_weights_average_one_per_trained_token_and_keep_their_ratios(
    pairs: list[tuple[float, int]],
) -> None:
    weights, tokens = [w for w, _ in pairs], [n for _, n in pairs]
    v = iteration_weights(weights, tokens)
    if not any(w * n for w, n in pairs):
        assert v == [0.0] * len(pairs)
        return
    assert sum(a * n for a, n in zip(v, tokens, strict=True)) == pytest.approx(sum(tokens))
    heaviest = max(range(len(pairs)), key=weights.__getitem__)
    for a, w in zip(v, weights, strict=True):
        assert a * weights[heaviest] == pytest.approx(v[heaviest] * w)


def test_iteration_weights_of_vanishing_likelihoods_stay_finite() -> None:
    v = iteration_weights([1e-300, 3e-300, 0.0], [10, 10, 10])
    assert v == pytest.approx([0.75, 2.25, 0.0])


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        iteration_weights([1.0, bad], [3, 3])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    vocabulary=st.integers(2, 9),
    chunk_rows=st.integers(1, 8),
)
def test_gradient_of_the_weighted_loss_is_correct(
    seed: int, rows: int, vocabulary: int, chunk_rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return weighted_nll(token_logprobs(x, targets), weights, normaliser=5.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGIT_CHUNK_BYTES", 4 * vocabulary * chunk_rows)
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


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(0, 12))
def test_shares_of_micro_batches_add_up_to_the_loss_of_the_batch(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(12, generator=generator, dtype=torch.float64)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    whole = weighted_nll(logprobs, weights, 12)
    shares = weighted_nll(logprobs[:cut], weights[:cut], 12) + weighted_nll(logprobs[cut:], weights[cut:], 12)
    torch.testing.assert_close(shares, whole)


def test_a_zero_weight_example_changes_nothing_but_the_normaliser() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -50.0], requires_grad=True)
    loss = weighted_nll(logprobs, torch.tensor([1.0, 0.5, 0.0]), normaliser=4)
    loss.backward()
    assert loss.item() == pytest.approx((1.0 + 1.0) / 4)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.25, -0.125, 0.0]
