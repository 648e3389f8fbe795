"""The two shipped GPU configurations, component by component, against a table that was worked out by hand.

Figures in GiB, for GPUs of 80 GB (79.6 GiB), bfloat16; the formula stands beside each. F parameters, N ranks, T tokens
a row, V vocabulary, h hidden size, f feed-forward size, L layers, M trained tokens a row.
"""

from __future__ import annotations

import pytest

from pipeline.core.plan.engine import EngineLoad, engine_needs
from pipeline.core.plan.learner import RankLoad, rank_memory
from pipeline.core.plan.memory import GIB
from pipeline.core.plan.shape import ModelShape
from tests.pipeline.core.plan.shapes import LLAMA_SHAPE, QWEN_SHAPE, in_gib

GPU = round(79.6 * GIB)
T = 16_384


def engine_load(share: float) -> EngineLoad:
    return EngineLoad(
        device="gpu",
        dtype="bfloat16",
        max_length=8_192,
        concurrency=256,
        batched_tokens=8_192,
        scored_tokens=8_192,
        gpu_memory=GPU,
        gpu_share=share,
    )


def rank_load(ranks: int, trained: int) -> RankLoad:
    return RankLoad(
        device="gpu",
        dtype="bfloat16",
        ranks=ranks,
        zero_stage=3,
        row_tokens=T,
        trained_tokens=trained,
        checkpointing=True,
    )


@pytest.mark.parametrize(
    ("shape", "share", "weights", "cache", "tokens", "token_bytes"),
    [
        (QWEN_SHAPE, 0.45, 14.2, 18.6, 348_000, 57_344),
        (LLAMA_SHAPE, 0.9, 15.0, 53.6, 439_000, 131_072),
    ],
)
def test_an_engine(
    shape: ModelShape, share: float, weights: float, cache: float, tokens: int, token_bytes: int
) -> None:
    needs = engine_needs(shape, engine_load(share))

    assert in_gib(needs.memory.of("weights")) == pytest.approx(weights, abs=0.05)  # 2F
    assert in_gib(needs.memory.of("context, activations, graphs")) == 3  # an estimate
    assert in_gib(needs.memory.of("KV cache")) == pytest.approx(cache, abs=0.1)  # the rest of the share
    # Outside of the share, and not in the table: log-probabilities of some 1,024 positions of a text that is scored.
    scored = needs.memory.of("log-probabilities")
    assert scored == pytest.approx(1_024 * shape.vocabulary * (2 + 4), rel=0.05)
    assert needs.memory.on("gpu") - scored <= share * GPU
    assert needs.cache.tokens == pytest.approx(tokens, rel=0.01)
    assert needs.cache.token_bytes == token_bytes  # 2 x 2 x L x KV heads x head size


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        (
            QWEN_SHAPE,
            8,
            {
                "weights": 1.8,  # 2F/N
                "master copy": 10.6 / 3,  # 4F/N
                "Adam": 10.6 * 2 / 3,  # 8F/N
                "gradients": 3.5,  # 4F/N
                "buckets": 0.9,  # 5e8 x 2
                "gathered layers": 1.9,  # 1e9 x 2
                "gathered output layer": 2.0,  # 4Vh
                "checkpoints": 3.1,  # 2LTh
                "CUDA and NCCL": 2.0,  # an estimate
            },
        ),
        (
            LLAMA_SHAPE,
            16,
            {
                "weights": 0.9,
                "master copy": 5.6 / 3,
                "Adam": 5.6 * 2 / 3,
                "gradients": 1.9,
                "buckets": 0.9,
                "gathered layers": 1.9,
                "gathered output layer": 2.0,
                "checkpoints": 4.0,
                "CUDA and NCCL": 2.0,
            },
        ),
    ],
)
def test_a_learner_rank(shape: ModelShape, ranks: int, expected: dict[str, float]) -> None:
    held = rank_memory(shape, rank_load(ranks, 2_900))

    for name, size in expected.items():
        assert in_gib(held.of(name)) == pytest.approx(size, abs=0.06), name


@pytest.mark.parametrize(("shape", "ranks", "layer"), [(QWEN_SHAPE, 8, 4.4), (LLAMA_SHAPE, 16, 3.9)])
def test_one_layer_forward_and_backward(shape: ModelShape, ranks: int, layer: float) -> None:
    """About 3.4 T (3f + 8h) in the table; here what the backward pass keeps, counted tensor by tensor."""
    held = rank_memory(shape, rank_load(ranks, 0))

    assert in_gib(held.of("one layer") + held.of("gradients inside a layer")) == pytest.approx(
        layer, rel=0.15
    )


@pytest.mark.parametrize(
    ("shape", "trained", "logits"),
    [
        (QWEN_SHAPE, 3_000, 1.7),
        (QWEN_SHAPE, 10_900, 6.2),
        (LLAMA_SHAPE, 2_900, 1.4),
        (LLAMA_SHAPE, 11_100, 5.3),
    ],
)
def test_logits_and_their_gradient(shape: ModelShape, trained: int, logits: float) -> None:
    """4MV, and one float32 piece of 128 MiB."""
    held = rank_memory(shape, rank_load(8, trained))

    assert in_gib(held.of("logits")) == pytest.approx(logits + 0.125, abs=0.06)


@pytest.mark.parametrize(
    ("shape", "ranks", "trained", "lowest", "highest"),
    [(QWEN_SHAPE, 8, (3_000, 10_900), 32, 36), (LLAMA_SHAPE, 16, (2_900, 11_100), 25, 28)],
)
def test_the_peak_of_a_rank(
    shape: ModelShape, ranks: int, trained: tuple[int, int], lowest: float, highest: float
) -> None:
    few, many = (in_gib(rank_memory(shape, rank_load(ranks, m)).on("gpu")) for m in trained)

    assert few == pytest.approx(lowest, rel=0.05)
    assert many == pytest.approx(highest, rel=0.05)
