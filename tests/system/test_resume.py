"""A run that is killed in the E-step or in the M-step, and started again by the same command, ends as one that was
never disturbed: same trajectories, same weights, same scores, same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pipeline.core.records import examples_from_table, trajectories_from_table
from tests.system.conftest import overrides, random_model
from tests.system.processes import finish, kill_when

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


IN_E_STEP, IN_M_STEP = "iterations/0001/rollouts", "iterations/0001/sample.json"
"""What is there first when a run has come so far."""


@pytest.mark.parametrize(
    ("adapters", "sign"), [("null", IN_E_STEP), ("{rank: 4, dropout: 0.1}", IN_M_STEP)], ids=["full", "LoRA"]
)
def test_a_killed_run_ends_like_an_undisturbed_one(
    world: Path, index: Path, tmp_path: Path, adapters: str, sign: str
) -> None:
    settings = overrides(world, index, random_model(tmp_path / "model", "Qwen2"))
    settings.append(f"learner.lora={adapters}")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, settings)

    kill_when(killed, settings, (killed / sign).exists)
    assert not (killed / "iterations/0001/searcher/train.json").exists()
    finish(killed, settings)

    assert scores(killed) == scores(undisturbed)
    for ours, theirs in zip(trajectories(killed), trajectories(undisturbed), strict=True):
        assert ours.question_id == theirs.question_id
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    for mine, other in zip(examples(killed), examples(undisturbed), strict=True):
        assert mine.number("weight") == pytest.approx(other.number("weight"), rel=1e-4)
    for name, tensor in weights(undisturbed).items():
        np.testing.assert_allclose(weights(killed)[name], tensor, atol=1e-5)


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
