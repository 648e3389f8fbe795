"""Other methods than ExSearch as whole runs: the one of docs/recipes.md, and two policies that share nothing but the
questions, killed and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import pipeline.recipes
from pipeline import methods
from pipeline.core.display import Display
from tests.actors.support import build_model
from tests.system.conftest import overrides
from tests.system.processes import finish, kill_when
from tests.system.with_test_recipes import add_recipes

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-searcher"


def documented_recipe() -> str:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(block)


def test_the_documented_recipe_is_short() -> None:
    assert len(documented_recipe().splitlines()) <= 80


def test_the_documented_recipe_trains(
    world: Path, index: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "rejection.py").write_text(documented_recipe(), encoding="utf-8")
    monkeypatch.setattr(pipeline.recipes, "__path__", pipeline.recipes.__path__)
    add_recipes(tmp_path / "recipes")
    settings = [s for s in overrides(world, index, MODEL) if not s.startswith(("em.", "cold_start."))]
    settings += ["recipe=rejection", "rejection.iterations=1", "rejection.least_f1=0.1", "rollout.samples=4"]
    outcome = methods.train(methods.load(None, settings), tmp_path / "run", Display())
    (row,) = outcome.report["iterations"]
    assert row["sample"]["sampled"] == 32
    assert row["searcher/train"]["examples"] == row["sample"]["kept"] > 0
    assert row["evaluation"]["push"]["searcher"]["version"] == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == outcome.report


# ---------------------------------------------------------------- two policies

DUET = (str(Path(__file__).with_name("with_test_recipes.py")),)


def test_two_policies_of_different_kinds_are_sampled_scored_trained_and_pushed_and_a_kill_changes_nothing(
    world: Path, index: Path, tmp_path: Path
) -> None:
    asker = build_model(tmp_path / "asker", "Qwen2")
    answerer = build_model(tmp_path / "answerer", "Llama", vocab_size=280, seed=1, layers=3)
    settings = [s for s in overrides(world, index, asker) if not s.startswith(("em.", "cold_start."))]
    settings += ["recipe=duet", f"duet.answerer={answerer}", "duet.iterations=1", "learner.num_ranks=1"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, settings, DUET)

    between = "iterations/0001/asker/train.json"
    kill_when(killed, settings, (killed / between).exists, DUET)
    assert not (killed / "iterations/0001/answerer/train.json").exists()
    finish(killed, settings, DUET)

    for run in (undisturbed, killed):
        evaluation = json.loads((run / "iterations/0001/evaluation.json").read_text())
        assert (run / "iterations/0001/asker/model").is_dir()
        assert evaluation["scores"]["n"] == 4
    pushed = json.loads((undisturbed / "iterations/0001/evaluation.json").read_text())["push"]
    assert {name: report["version"] for name, report in pushed.items()} == {"asker": 1, "answerer": 1}
    for name in ("asker", "answerer"):
        trained, other = (
            load_file(run / f"iterations/0001/{name}/model/model.safetensors")
            for run in (undisturbed, killed)
        )
        started = load_file(tmp_path / name / "model.safetensors")
        assert any(not np.array_equal(trained[key], started[key]) for key in trained)
        for key, tensor in trained.items():
            np.testing.assert_array_equal(other[key], tensor, err_msg=f"{name} {key}")
    finish(undisturbed, ["--split", "dev", "--out", str(tmp_path / "again.json")], DUET, "evaluate")
    again, then = (
        pq.read_table(path).column("token_ids").to_pylist()
        for path in (tmp_path / "again.parquet", undisturbed / "iterations/0001/evaluation.parquet")
    )
    assert again == then  # what `evaluate` runs is both trained models
    first, second = (
        json.loads((run / "iterations/0001/scores.json").read_text()) for run in (undisturbed, killed)
    )
    for name in ("asker", "answerer"):
        assert first[name] == pytest.approx(second[name], rel=1e-6)
        assert all(value < 0 for value in first[name])
