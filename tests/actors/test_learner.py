"""The learner on real DeepSpeed ranks (gloo, CPU, float32): one mathematics, however the work is cut up.

The reference is a bare torch loop over single examples that follows the formula of the loss literally.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from actors.learner_rank import LearnerRank
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import UserError
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.packing import plan_epoch
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example
from pipeline.core.schedule import learning_rate_at
from tests.actors.ranks import (
    CONFIG,
    LONGEST,
    PROCESS_TIMEOUT_S,
    Weights,
    assert_same_weights,
    build_model,
    make_examples,
    run_ranks,
    train,
    train_only,
    weight_of,
)

pytestmark = pytest.mark.component


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


# ------------------------------------------------------------------ the mathematics


@dataclass(frozen=True)
class Expected:
    """By step, and the weights at the end."""

    losses: list[float]
    grad_norms: list[float]
    weights: Weights


def reference(model: Path, examples: list[Example], config: LearnerConfig) -> Expected:
    """By the formula of the loss, one example at a time, without DeepSpeed."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.0, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    n = [int(e.loss_mask[1:].sum()) for e in examples]
    scale = sum(n) / sum(weight_of(e) * n_k for e, n_k in zip(examples, n, strict=True))
    lengths = [len(e.token_ids) for e in examples]
    steps = [
        step.examples
        for epoch in range(config.epochs)
        for step in plan_epoch(
            lengths,
            batch_size=config.batch_size,
            world_size=1,
            token_budget=1000,
            seed=(1, epoch),
            units=[e.unit for e in examples],
        )
    ]
    losses, grad_norms = [], []
    for index, batch in enumerate(steps):
        loss = torch.zeros(())
        for k in batch:
            ids = torch.from_numpy(examples[k].token_ids.astype(np.int64))
            logprobs = network(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            mask = torch.from_numpy(examples[k].loss_mask[1:])
            loss = loss - weight_of(examples[k]) * scale * logprobs[mask].sum()
        loss = loss / sum(n[k] for k in batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clipping)
        grad_norms.append(norm.item())
        optimizer.param_groups[0]["lr"] = learning_rate_at(
            index, len(steps), peak=config.learning_rate, warmup_ratio=config.warmup_ratio, min_ratio=0.0
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: p.detach().numpy() for name, p in network.named_parameters()}
    return Expected(losses, grad_norms, weights)


@pytest.fixture(scope="module")
def expected(model_path: Path) -> Expected:
    return reference(model_path, make_examples(), CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_microbatch": LONGEST},
        {"num_ranks": 2, "tokens_per_microbatch": LONGEST},
        {"num_ranks": 2, "zero_stage": 1, "tokens_per_microbatch": 1000},
        {"num_ranks": 2, "zero_stage": 2},
        {"num_ranks": 2, "zero_stage": 2, "offload_optimizer": True},
        {"num_ranks": 2, "zero_stage": 3},
        {"num_ranks": 2, "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"num_ranks": 2, "zero_stage": 3, "gradient_checkpointing": True, "tokens_per_microbatch": 1000},
        {"num_ranks": 3, "zero_stage": 1, "attention": "eager"},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_ranks_zero_stage_and_packing_do_not_change_losses_gradients_or_weights(
    model_path: Path, expected: Expected, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=changes)
    metrics, weights = run_ranks(config, model_path, train, make_examples())
    assert [step["loss"] for step in metrics.history] == pytest.approx(expected.losses, abs=1e-5)
    assert [step["grad_norm"] for step in metrics.history] == pytest.approx(expected.grad_norms, rel=1e-4)
    assert_same_weights(weights, expected.weights)


def siblings() -> list[Example]:
    """Four questions of three trajectories: of each the second begins like the first, the third is it once more."""
    examples = make_examples()
    made = []
    for k, example in enumerate(examples):
        first = examples[k - k % 3]
        ids, mask = example.token_ids.copy(), example.loss_mask.copy()
        if k % 3 == 1:
            common = min(len(ids), first.length) // 2
            ids[:common], mask[:common] = first.token_ids[:common], first.loss_mask[:common]
        elif k % 3 == 2:
            ids, mask = first.token_ids, first.loss_mask
        made.append(replace(example, unit=f"q{k // 3}", token_ids=ids, loss_mask=mask))
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_microbatch": 1000},
        {"tokens_per_microbatch": LONGEST, "num_ranks": 2},
        {"num_ranks": 2, "zero_stage": 3, "gradient_checkpointing": True},
        {"share_prefixes": False, "num_ranks": 2},
        {"attention": "eager"},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_that_common_beginnings_are_computed_once_does_not_change_losses_gradients_or_weights(
    model_path: Path, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=changes)
    expected = reference(model_path, siblings(), config)
    metrics, weights = run_ranks(config, model_path, train, siblings())
    assert [step["loss"] for step in metrics.history] == pytest.approx(expected.losses, abs=1e-5)
    assert [step["grad_norm"] for step in metrics.history] == pytest.approx(expected.grad_norms, rel=1e-4)
    assert_same_weights(weights, expected.weights)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_bfloat16_comes_close_to_float32_at_any_stage_in_loss_and_gradient(
    model_path: Path, expected: Expected, ranks: int, stage: int
) -> None:
    # Adam takes the same steps with gradients twice as large: only their norm tells.
    config = CONFIG.model_copy(update={"dtype": "bfloat16", "zero_stage": stage, "num_ranks": ranks})
    metrics = run_ranks(config, model_path, train_only, make_examples())
    assert [step["loss"] for step in metrics.history] == pytest.approx(expected.losses, rel=0.02)
    assert [step["grad_norm"] for step in metrics.history] == pytest.approx(expected.grad_norms, rel=0.05)


def test_what_zero_weight_examples_say_does_not_matter(model_path: Path) -> None:
    examples = make_examples()
    nonsense = [e if weight_of(e) else replace(e, token_ids=e.token_ids[::-1].copy()) for e in examples]
    first, second = (run_ranks(CONFIG, model_path, train, batch) for batch in (examples, nonsense))
    assert_same_weights(second[1], first[1], atol=0)
    assert first[0].skipped_examples == 3


def test_nothing_with_weight_leaves_the_model_as_it_is(model_path: Path) -> None:
    failures = [e for e in make_examples() if not weight_of(e)]
    metrics, weights = run_ranks(CONFIG, model_path, train, failures)
    assert metrics.steps == 0
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    assert_same_weights(weights, {n: p.detach().numpy() for n, p in original.named_parameters()}, atol=0)


def test_metrics_say_what_was_trained(model_path: Path) -> None:
    examples = make_examples()
    metrics = run_ranks(CONFIG, model_path, train_only, examples)
    computed = [e for e in examples if weight_of(e)]
    assert metrics.trained_tokens == 2 * sum(int(e.loss_mask[1:].sum()) for e in computed)
    assert metrics.total_tokens == 2 * sum(len(e.token_ids) for e in computed)
    assert metrics.steps == len(metrics.history) == 6
    assert metrics.averages["loss"] < metrics.history[0]["loss"]
    assert 0 < metrics.pack_fill <= 1
    assert metrics.rank_balance == 1.0


def test_examples_of_negligible_weight_count_but_are_not_computed(model_path: Path) -> None:
    config = CONFIG.model_copy(update={"negligible_weight": 0.5})  # the examples of weight 0.3 are below it
    found, full = (run_ranks(c, model_path, train_only, make_examples()) for c in (config, CONFIG))
    assert (found.skipped_examples, full.skipped_examples) == (6, 3)
    assert [step["tokens"] for step in found.history] == [step["tokens"] for step in full.history]
    computed = [e for e in make_examples() if weight_of(e) >= 1]
    assert found.total_tokens == 2 * sum(len(e.token_ids) for e in computed)


def test_an_example_that_does_not_fit_is_an_error_that_names_it(model_path: Path) -> None:
    config = CONFIG.model_copy(update={"tokens_per_microbatch": 16})
    with pytest.raises(
        UserError, match=r"q\d+/0 has \d+ tokens, more than learner\.tokens_per_microbatch: 16"
    ):
        run_ranks(config, model_path, train_only, make_examples())


# ------------------------------------------------------------------ as a Ray actor


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_a_ray_actor_trains_from_shards_and_tells_its_progress(
    model_path: Path, tmp_path: Path, ray_cluster: Any, expected: tuple[list[float], Weights]
) -> None:
    examples = make_examples()
    shards = [tmp_path / f"{part}.parquet" for part in range(2)]
    pq.write_table(examples_to_table(examples[:7]), shards[0])
    pq.write_table(examples_to_table(examples[7:]), shards[1])
    rank = LearnerRank.remote(CONFIG, model_path)
    assert ray_cluster.get(rank.progress.remote(), timeout=PROCESS_TIMEOUT_S)["num_steps"] == 0
    metrics = ray_cluster.get(
        rank.train.remote(shards, WeightedNll(CONFIG.negligible_weight), phase_seed=1),
        timeout=PROCESS_TIMEOUT_S,
    )
    assert [step["loss"] for step in metrics.history] == pytest.approx(expected.losses, abs=1e-5)
    assert ray_cluster.get(rank.progress.remote(), timeout=60)["step"] == 6
