"""A run that is killed in the E-step or in the M-step, and started again by the same command, ends as one that was
never disturbed: same trajectories, same weights, same scores, same model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pipeline.core.record_tables import examples_from_table, trajectories_from_table
from tests.system.conftest import overrides, random_model
from tests.system.processes import finish, kill_when

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(1800)]

QUESTIONS = 8
"""Training questions of the world."""


def test_a_run_killed_in_the_e_step_keeps_its_shards_and_ends_like_an_undisturbed_one(
    world: Path, index: Path, tmp_path: Path
) -> None:
    settings = overrides(world, index, random_model(tmp_path / "model", "Qwen2"))
    # Two questions at a time, so that a shard is complete long before the last one is.
    settings += ["rollout.questions_per_shard=1", "rollout.concurrency=2"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, settings)

    kill_when(killed, settings, (killed / "iterations/0001/rollouts/_000000.json").exists)
    kept = shards_when_at_rest(killed)
    assert 0 < len(kept) < QUESTIONS
    finish(killed, settings)

    now = shards(killed)
    assert len(now) == QUESTIONS and {name: now[name] for name in kept} == kept
    log = (killed / "run.log").read_text()
    assert f"{len(kept)} of {QUESTIONS} tasks are not sampled again" in log
    assert sampled(killed) == sampled(undisturbed)
    assert scores(killed) == scores(undisturbed)
    for ours, theirs in zip(trajectories(killed), trajectories(undisturbed), strict=True):
        assert ours.question_id == theirs.question_id
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    for mine, other in zip(examples(killed), examples(undisturbed), strict=True):
        assert mine.number("log_weight") == pytest.approx(other.number("log_weight"), abs=1e-4)
    for name, tensor in weights(undisturbed).items():
        np.testing.assert_allclose(weights(killed)[name], tensor, atol=1e-5)


def test_a_run_killed_within_the_m_step_goes_on_behind_its_last_checkpoint(
    world: Path, index: Path, tmp_path: Path
) -> None:
    settings = overrides(world, index, random_model(tmp_path / "model", "Qwen2"))
    settings += ["learner.lora={rank: 4, dropout: 0.1}", "learner.batch_size=1", "learner.epochs=4"]
    killed, from_the_start = tmp_path / "killed", tmp_path / "from-the-start"
    learner = "iterations/0001/searcher/learner"
    marker = killed / learner / "checkpoint.json"
    kill_when(killed, [*settings, "learner.checkpoint_minutes=1e-9"], marker.exists)
    saved = step_when_at_rest(marker)
    assert not (killed / "iterations/0001/searcher/train.json").exists()

    # The same E-step, and no checkpoint of the M-step: that is done as one piece.
    shutil.copytree(killed, from_the_start)
    shutil.rmtree(from_the_start / learner)
    for run in (killed, from_the_start):
        finish(run, settings)
    mended, whole = (trained(run) for run in (killed, from_the_start))
    assert (mended["resumed_at"], whole["resumed_at"]) == (saved, 0)
    assert 0 < mended["resumed_at"] < mended["steps"] == whole["steps"]
    assert history(killed) == history(from_the_start)
    assert len(history(killed)) == mended["steps"]
    assert scores(killed) == scores(from_the_start)
    for name, tensor in weights(from_the_start).items():
        np.testing.assert_array_equal(weights(killed)[name], tensor)


def shards(run: Path) -> dict[str, list[tuple[int, int]]]:
    """Inode and time of the last change of each complete shard's files, by the name of its side-car."""
    iteration = run / "iterations/0001"
    return {
        side_car.name: [
            (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in (side_car, *sorted(iteration.rglob(f"{side_car.stem[1:]}.parquet")))
        ]
        for side_car in (iteration / "rollouts").glob("_*.json")
    }


def shards_when_at_rest(run: Path) -> dict[str, list[tuple[int, int]]]:
    """The weighting actor outlives its driver by a moment, and may complete another shard."""
    before = None
    while (now := shards(run)) != before:
        before = now
        time.sleep(5)
    return now


def sampled(run: Path) -> dict[str, Any]:
    """The figures of the E-step but for its time and its engines', which are those of the process that finished it;
    without the digits that depend on who was in one batch."""
    figures = json.loads((run / "iterations/0001/sample.json").read_text())
    for name in ("seconds", "seconds_waited", "engines"):
        del figures[name]
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}


def step_when_at_rest(marker: Path) -> int:
    """The step of the last checkpoint: ranks outlive their driver by a moment, and may write another one."""
    before = None
    while (now := marker.read_text()) != before:
        before = now
        time.sleep(5)
    return int(json.loads(now)["step"])


def trained(run: Path) -> dict[str, Any]:
    return json.loads((run / "iterations/0001/searcher/train.json").read_text())  # type: ignore[no-any-return]


def history(run: Path) -> list[dict[str, float]]:
    """What was logged of each optimiser step of the M-step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["iteration"] == 1 and line["step"] is not None]


def scores(run: Path) -> dict[str, float]:
    report = json.loads((run / "report.json").read_text())
    return {name: result["f1"] for name, result in report["test"].items()} | {
        "dev": report["iterations"][0]["dev"]["f1"]
    }


def trajectories(run: Path) -> list:  # type: ignore[type-arg]
    return trajectories_from_table(pq.read_table(run / "iterations/0001/rollouts"))


def examples(run: Path) -> list:  # type: ignore[type-arg]
    return examples_from_table(pq.read_table(run / "iterations/0001/searcher/examples"))


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "iterations/0001/searcher/model/model.safetensors")
