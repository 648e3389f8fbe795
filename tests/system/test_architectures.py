"""One EM iteration each with random models of four architectures, with a chat template and without."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config_loading import load_config
from pipeline.display import Display
from pipeline.records import examples_from_table, trajectories_from_table
from tests.system.conftest import overrides, random_model

pytestmark = pytest.mark.system


@pytest.mark.parametrize("layout", ["plain", "chat"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_one_iteration_changes_the_model_and_reports(
    architecture: str, layout: str, world: Path, index: Path, ray_cluster: None, tmp_path: Path
) -> None:
    from pipeline.em import train

    model = random_model(tmp_path / "model", architecture)
    settings = [*overrides(world, index, model), f"agent.layout={layout}"]
    report = train(load_config(None, settings), tmp_path / "run", Display())

    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert set(report["test"]) == {"base", "warm_up", "no_search", "one_search", "best"}
    (row,) = report["iterations"]
    assert row["train"]["questions"] == 8 and row["train"]["likelihood_bound"] < 0
    assert row["learner"]["steps"] == 2 and row["dev"]["n"] == 4
    assert row["push"]["version"] == 1 and row["push"]["tensors"] > 0
    assert sum(row["train"]["stop_reasons"].values()) == 16

    iteration = tmp_path / "run" / "iterations" / "0001"
    assert (iteration / "DONE").exists()
    trajectories = trajectories_from_table(pq.read_table(iteration / "rollouts"))
    examples = examples_from_table(pq.read_table(iteration / "weighted"))
    assert len(trajectories) == len(examples) == 16
    assert {t.policy_version for t in trajectories} == {0}
    for trajectory, example in zip(trajectories, examples, strict=True):
        context = trajectory.token_ids[: trajectory.answer_start]
        assert (example.token_ids[: trajectory.answer_start] == context).all()
    assert _weights(iteration / "model") != _weights(model)


def _weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()
