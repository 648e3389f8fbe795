"""Checkpoints that are written while training goes on: slow ones, failing ones, and ones that were damaged later."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from actors import checkpointer, learner_files
from actors.learner import Learner
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.core.training import TrainReport
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
    weights_of,
)

pytestmark = pytest.mark.component

SAVING = CONFIG.model_copy(
    update={"num_ranks": 2, "zero_stage": 2, "checkpoint_minutes": AFTER_EACH_STEP, "epochs": 2}
)
STEPS = 6


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def go_on(learner: Learner, examples: list[Example], path: Path) -> Result:
    report = learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path)
    return report, weights_of(learner)


def marker(path: Path) -> dict[str, Any]:
    return json.loads((path / "checkpoint.json").read_text())  # type: ignore[no-any-return]


# ------------------------------------------------------------------ written in the background


def train_beside_a_slow_disk(learner: Learner, examples: list[Example], path: Path) -> list[bool]:
    """Whether the first checkpoint counts, behind each step. The disk of rank 1 is as slow as three steps."""
    may_write, write = threading.Event(), checkpointer._write

    def slowly(*arguments: Any) -> Any:
        may_write.wait(60)
        return write(*arguments)

    if learner.rank == 1:
        checkpointer._write = slowly  # type: ignore[assignment]
    counts: list[bool] = []

    def look(_: dict[str, float]) -> None:
        counts.append((path / "checkpoint.json").exists())
        if len(counts) == 1:
            learner.checkpoint(path)
        if len(counts) == 4:
            may_write.set()
            learner.finish_checkpoint()
            counts.append((path / "checkpoint.json").exists())

    learner.train(examples, nll_of(learner), phase_seed=1, on_step=look)
    return counts


def test_training_goes_on_while_a_checkpoint_is_written_which_counts_when_all_ranks_are_done(
    model_path: Path, tmp_path: Path
) -> None:
    examples = make_examples()
    counts = run_ranks(SAVING, model_path, train_beside_a_slow_disk, examples, tmp_path)
    assert counts == [False] * 4 + [True] * 3
    assert marker(tmp_path)["step"] == 1
    resumed, weights = run_ranks(SAVING, model_path, go_on, examples, tmp_path)
    assert resumed.resumed_at == 1
    assert_same_weights(weights, run_ranks(SAVING, model_path, train, examples)[1], atol=0)


def train_without_memory(learner: Learner, examples: list[Example], path: Path) -> Result:
    checkpointer.MEMORY_SHARE = 0.0
    return go_on(learner, examples, path)


def test_where_memory_has_no_room_for_a_copy_training_waits_for_the_disk(
    model_path: Path, tmp_path: Path
) -> None:
    examples = make_examples()
    expected = run_ranks(SAVING, model_path, train_without_memory, examples, tmp_path)[1]
    resumed, weights = run_ranks(SAVING, model_path, go_on, examples, tmp_path)
    assert resumed.resumed_at >= STEPS - 2
    assert_same_weights(weights, expected, atol=0)


# ------------------------------------------------------------------ that cannot be written


def train_until_the_disk_is_full(learner: Learner, examples: list[Example], path: Path) -> None:
    """The disk of rank 1 takes two checkpoints."""
    write, written = checkpointer._write, []

    def full(*arguments: Any) -> Any:
        written.append(1)
        if learner.rank == 1 and len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    checkpointer._write = full
    learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path)


def test_a_full_disk_ends_the_training_in_one_clear_sentence_and_leaves_the_checkpoint_before(
    model_path: Path, tmp_path: Path
) -> None:
    examples = make_examples()
    message = r"checkpoint of optimiser step 3 could not be written \(.*No space left on device\); that of step 2 is"
    with pytest.raises(UserError, match=message):
        run_ranks(SAVING, model_path, train_until_the_disk_is_full, examples, tmp_path)
    resumed, weights = run_ranks(SAVING, model_path, go_on, examples, tmp_path)
    assert resumed.resumed_at == 2
    assert_same_weights(weights, run_ranks(SAVING, model_path, train, examples)[1], atol=0)


def train_and_export_to_a_full_disk(learner: Learner, examples: list[Example], path: Path) -> None:
    """As much of the model as the disk takes is written."""

    def full(directory: Path, *_: object) -> None:
        (directory / "model.safetensors").write_bytes(b"some of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    learner_files.write_model = full  # type: ignore[assignment]
    learner.train(examples, nll_of(learner), phase_seed=1)
    learner.save(path / "learner", model=path / "model")


def test_a_disk_too_full_for_the_model_costs_no_training(model_path: Path, tmp_path: Path) -> None:
    examples = make_examples()
    with pytest.raises(
        UserError, match=r"model: the model could not be written .*No space left .*run the same"
    ):
        run_ranks(SAVING, model_path, train_and_export_to_a_full_disk, examples, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["learner"]
    resumed, weights = run_ranks(SAVING, model_path, go_on, examples, tmp_path / "learner")
    assert resumed.resumed_at == STEPS
    assert_same_weights(weights, run_ranks(SAVING, model_path, train, examples)[1], atol=0)


# ------------------------------------------------------------------ that were damaged


def train_some(learner: Learner, examples: list[Example], path: Path) -> TrainReport:
    """All steps; the last two checkpoints are behind steps 4 and 5."""

    def finish(_: dict[str, float]) -> None:
        learner.finish_checkpoint()

    report = learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path, on_step=finish)
    learner.finish_checkpoint()
    return report


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_that_for_the_start(
    model_path: Path, tmp_path: Path, damage: Any
) -> None:
    examples = make_examples()
    run_ranks(SAVING, model_path, train_some, examples, tmp_path)
    found = marker(tmp_path)
    assert (found["step"], found["before"]["step"]) == (STEPS - 1, STEPS - 2)
    undisturbed = run_ranks(SAVING, model_path, train, examples)[1]
    config = SAVING.model_copy(update={"checkpoint_minutes": 0})

    damage(tmp_path / found["slot"] / "rank_1_000.safetensors")
    resumed, weights = run_ranks(config, model_path, go_on, examples, tmp_path)
    assert resumed.resumed_at == STEPS - 2
    assert_same_weights(weights, undisturbed, atol=0)
    (problem,) = resumed.damaged_checkpoints
    assert "the checkpoint of step 5 is damaged" in problem and "rank_1_000.safetensors" in problem

    damage(tmp_path / found["before"]["slot"] / "rank_0.pt")
    again, weights = run_ranks(config, model_path, go_on, examples, tmp_path)
    assert (again.resumed_at, len(again.damaged_checkpoints)) == (0, 2)
    assert_same_weights(weights, undisturbed, atol=0)


def train_and_save(learner: Learner, examples: list[Example], path: Path) -> None:
    train(learner, examples)
    learner.save(path)


def load(learner: Learner, path: Path) -> None:
    learner.load(path)


def test_a_version_whose_state_is_damaged_is_refused(model_path: Path, tmp_path: Path) -> None:
    run_ranks(SAVING, model_path, train_and_save, make_examples(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "checkpoint.json"]
    flip(tmp_path / "a" / "rank_0_000.safetensors")
    with pytest.raises(UserError, match=r"rank_0_000.safetensors was changed .* Copy the directory back"):
        run_ranks(SAVING, model_path, load, tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"slot": "a", ')
    with pytest.raises(UserError, match=r"checkpoint\.json is damaged"):
        run_ranks(SAVING, model_path, load, tmp_path)
