"""What a learner checks of its examples before it trains on them, and what a rank reads and keeps of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from actors.learner_examples import PhaseExamples
from pipeline.core.errors import UserError
from pipeline.core.losses.contrastive import InfoNce
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Loss
from pipeline.core.losses.policy_gradient import ClippedRatio
from pipeline.core.losses.preference import Dpo
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example
from pipeline.core.training_phase import phase_key

NLL = WeightedNll()
MASK = np.array([False, False, True, True])


def example(**streams: Any) -> Example:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in streams.items()}
    return Example("q7/3", "q7", "policy", np.arange(4, dtype=np.int32), MASK, arrays)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("loss", "streams", "message"),
    [
        (
            Dpo(),
            {"reference_logprob": [-3.0]},
            "Dpo needs the stream label, which example q7/3 has not; it has reference_logprob",
        ),
        (
            Dpo(),
            {"label": [1.0], "reference_logprob": [0.0, 0.0, -1.0, -2.0]},
            r"Dpo needs the stream reference_logprob as one number; that of example q7/3 has the shape \[4\]",
        ),
        (
            ClippedRatio(),
            {"advantage": [[1.0, 2.0], [3.0, 4.0]], "old_logprob": [-1.0] * 4},
            r"ClippedRatio needs the stream advantage as one number per token, or one for all; .* \[2, 2\]",
        ),
        (
            Divergence(),
            {"reference_logits": [0.0] * 4},
            r"Divergence needs the stream reference_logits as a row of numbers per target; .* \[4\]",
        ),
        (
            ClippedRatio(),
            {"advantage": [1.0], "old_logprob": [0.0, 0.0, np.nan, -1.0]},
            "ClippedRatio needs a finite stream old_logprob; that of example q7/3 is not",
        ),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_stream_that_a_loss_cannot_take_is_named_with_its_example(
    tmp_path: Path, loss: Loss, streams: dict[str, Any], message: str, on_disk: bool
) -> None:
    examples = [example(**streams)]
    with pytest.raises(UserError, match=message):
        PhaseExamples([write(tmp_path, examples)] if on_disk else examples, loss, "lm").load([0])


def test_what_stands_on_tokens_that_are_no_targets_does_not_matter() -> None:
    old_logprob = [np.nan, np.nan, -1.0, -2.0]  # as a trajectory has them
    examples = [example(advantage=[-1.0], old_logprob=old_logprob)]
    assert PhaseExamples(examples, ClippedRatio(), "lm").load([0]) == {0: examples[0]}


def test_a_head_that_does_not_give_what_a_loss_needs_is_named() -> None:
    with pytest.raises(UserError, match="InfoNce needs embeddings, which a head lm does not give"):
        PhaseExamples([], InfoNce(), "lm")


def test_examples_are_numbered_through_all_shards(tmp_path: Path) -> None:
    examples = [weighted(f"q{k}", k) for k in range(10)]
    shards = [write(tmp_path, part, str(n)) for n, part in enumerate((examples[:4], [], examples[4:]))]
    found = PhaseExamples(shards, NLL, "lm")
    assert [outline.id for outline in found.outlines] == [one.id for one in examples]
    own = found.load([9, 4, 0, 4])
    assert sorted(own) == [0, 4, 9]
    for number, loaded in own.items():
        assert loaded.id == f"q{number}"
        np.testing.assert_array_equal(loaded.token_ids, examples[number].token_ids)


def test_a_rank_holds_its_own_examples_and_no_tokens_of_others(tmp_path: Path) -> None:
    length, count = 10_000, 40
    ids, mask = np.arange(length, dtype=np.int32), np.ones(length, np.bool_)
    examples = [
        Example(f"q{k}", f"q{k}", "policy", ids, mask, {"log_weight": np.zeros(1)}) for k in range(count)
    ]
    shards = [write(tmp_path, examples[start : start + 10], str(start)) for start in range(0, count, 10)]
    gc.collect()
    before = pa.total_allocated_bytes()
    found = PhaseExamples(shards, NLL, "lm")
    assert pa.total_allocated_bytes() - before < length
    own = found.load(range(0, count, 8))
    assert len(own) == 5
    assert pa.total_allocated_bytes() - before < 2 * 5 * length * 4


def test_the_key_of_a_phase_changes_with_examples_loss_and_settings(tmp_path: Path) -> None:
    one, other = weighted("q0", 0), weighted("q1", 1)

    def key(*parts: list[Example], loss: Loss = NLL, rate: float = 1.0) -> str:
        shards = [write(tmp_path, part, str(n)) for n, part in enumerate(parts)]
        return phase_key(PhaseExamples(shards, loss, "lm").digests, loss, rate)

    keys = [
        key([one], [other]),
        key([other], [one]),
        key([one]),
        key([one], [weighted("q1", 1, weight=2.0)]),
        key([one], [weighted("q1", 2)]),
        key([one], [other], loss=WeightedNll(0.5)),
        key([one], [other], rate=2.0),
    ]
    assert len(set(keys)) == len(keys)
    assert key([one], [other]) == keys[0]
    in_memory = [PhaseExamples(records, NLL, "lm").digests for records in ([one, other], [one])]
    assert in_memory[0] != in_memory[1]


def weighted(name: str, seed: int, weight: float = 1.0) -> Example:
    ids = np.random.default_rng(seed).integers(0, 1000, 4).astype(np.int32)
    return Example(name, name, "policy", ids, MASK, {"log_weight": np.array([weight])})


def write(folder: Path, examples: list[Example], name: str = "shard") -> Path:
    pq.write_table(examples_to_table(examples), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"
