"""Ranks that train from shards: each reads its own part, and all of them fail alike, before anything has changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.collectives import gathered
from actors.learner import Learner
from actors.learner_examples import PhaseExamples
from pipeline.core.errors import UserError
from pipeline.core.losses.policy_gradient import ClippedRatio
from pipeline.core.packing import plan_epoch
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example
from tests.actors.ranks import (
    AFTER_EACH_STEP,
    CONFIG,
    Result,
    assert_same_weights,
    build_model,
    make_examples,
    nll_of,
    run_ranks,
    train,
    weight_of,
    weights_of,
)

pytestmark = pytest.mark.component

TWO_RANKS = CONFIG.model_copy(update={"num_ranks": 2, "zero_stage": 1, "epochs": 1, "batch_size": 2})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def write(folder: Path, examples: list[Example]) -> list[Path]:
    """Shards of 5, 5 and 2."""
    shards = [folder / f"{start}.parquet" for start in range(0, len(examples), 5)]
    for shard, start in zip(shards, range(0, len(examples), 5), strict=True):
        pq.write_table(examples_to_table(examples[start : start + 5]), shard)
    return shards


def with_streams(example: Example, advantage: float) -> Example:
    streams = {"advantage": np.full(len(example.token_ids), advantage), "old_logprob": np.array([-1.0])}
    return Example(example.id, example.unit, example.role, example.token_ids, example.loss_mask, streams)


# ------------------------------------------------------------------ what a rank has


def looks_and_loads(learner: Learner, shards: list[Path]) -> list[Any]:
    """Of each rank: what it knows of all examples, and which ones it has."""
    found = PhaseExamples(shards, nll_of(learner), "lm")
    own = found.load(range(learner.rank, len(found.outlines), 2))
    return gathered((found.outlines, found.digests, [example.id for example in own.values()]))


def test_all_ranks_know_the_same_of_all_examples_and_load_their_own(model_path: Path, tmp_path: Path) -> None:
    examples = make_examples()
    first, second = run_ranks(TWO_RANKS, model_path, looks_and_loads, write(tmp_path, examples))
    assert first[:2] == second[:2]
    assert [(o.id, o.length, o.num_targets, o.number("log_weight")) for o in first[0]] == [
        (e.id, e.length, e.num_targets, e.number("log_weight")) for e in examples
    ]
    assert (first[2], second[2]) == ([e.id for e in examples[0::2]], [e.id for e in examples[1::2]])


# ------------------------------------------------------------------ training


def train_until_killed(learner: Learner, shards: list[Path], path: Path) -> None:
    def die(_: dict[str, float]) -> None:
        if learner.progress()["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(shards, nll_of(learner), phase_seed=1, checkpoints=path, on_step=die)


def go_on(learner: Learner, shards: list[Path], path: Path) -> tuple[Result, set[int]]:
    """Also which examples rank 0 has loaded."""
    loaded: set[int] = set()
    load = PhaseExamples.load

    def noting(self: PhaseExamples, own: Iterable[int]) -> Mapping[int, Example]:
        found = load(self, own)
        loaded.update(found)
        return found

    PhaseExamples.load = noting  # this process ends with the test
    report = learner.train(shards, nll_of(learner), phase_seed=1, checkpoints=path)
    return (report, weights_of(learner)), loaded


def of_rank_zero(examples: list[Example], behind: int) -> set[int]:
    """What it computes in the steps that follow."""
    steps = plan_epoch(
        [e.length if weight_of(e) else 0 for e in examples],
        batch_size=TWO_RANKS.batch_size,
        world_size=2,
        token_budget=TWO_RANKS.tokens_per_microbatch,
        seed=(1, 0),
        units=[e.unit for e in examples],
    )
    return {k for step in steps[behind:] for pack in step.packs[0] for k in pack}


def test_shards_teach_bit_for_bit_what_records_do_also_behind_a_checkpoint(
    model_path: Path, tmp_path: Path
) -> None:
    config = TWO_RANKS.model_copy(update={"checkpoint_minutes": AFTER_EACH_STEP})
    examples = make_examples()
    shards = write(tmp_path, examples)
    expected, weights = run_ranks(TWO_RANKS, model_path, train, examples)
    run_ranks(config, model_path, train_until_killed, shards, tmp_path / "learner")
    (resumed, found), loaded = run_ranks(config, model_path, go_on, shards, tmp_path / "learner")
    assert resumed.resumed_at > 0
    assert loaded == of_rank_zero(examples, resumed.resumed_at) < of_rank_zero(examples, 0)
    assert resumed.history == expected.history
    assert (resumed.trained_tokens, resumed.total_tokens) == (expected.trained_tokens, expected.total_tokens)
    assert_same_weights(found, weights, atol=0)


# ------------------------------------------------------------------ failing


def messages(learner: Learner, shards: list[Path]) -> tuple[list[str], bool]:
    """What each rank says, and whether the weights are what they were."""
    before = weights_of(learner)
    try:
        learner.train(shards, ClippedRatio(), phase_seed=1)
        message = "none"
    except UserError as error:
        message = str(error)
    after = weights_of(learner)
    return gathered(message), all((before[name] == after[name]).all() for name in before)


def test_what_one_rank_alone_reads_ends_all_of_them_alike_before_the_first_step(
    model_path: Path, tmp_path: Path
) -> None:
    examples = [with_streams(example, 1.0) for example in make_examples()]
    examples[7] = with_streams(examples[7], np.nan)
    shards = write(tmp_path, examples)
    said, is_untouched = run_ranks(TWO_RANKS, model_path, messages, shards)
    assert said == ["ClippedRatio needs a finite stream advantage; that of example q7/0 is not"] * 2
    assert is_untouched

    shards[1].write_text("a shard of the second rank")
    said, is_untouched = run_ranks(TWO_RANKS, model_path, messages, shards)
    assert said[0] == said[1]
    assert said[0].startswith(f"{shards[1]} holds no training examples")
    assert is_untouched
