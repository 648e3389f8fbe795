"""Other methods than ExSearch as whole runs: the one of docs/recipes.md, and two policies that share nothing but the
questions. `make chaos` kills the latter between two trainings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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


def test_flashback_goes_from_nothing_to_the_report_and_again_to_the_same(
    world: Path, index: Path, ray_cluster: None, tmp_path: Path
) -> None:
    """With everything that it has: flashbacks, projected gradients, latent tasks."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    hops = [row["hops"] for row in rows]
    assert len(set(hops)) > 1
    settings = [s for s in overrides(world, index, MODEL) if not s.startswith("em.")]
    settings += [
        "recipe=flashback",
        "flashback={iterations: 1, prompts: 2, per_step: 2, project_conflicts: true}",
        f"flashback.old_hops=[{min(hops)}]",
        "flashback.latent={tasks: 3, rank: 2}",
    ]
    run = tmp_path / "run"
    outcome = methods.train(methods.load(None, settings), run, Display())
    start, (row,) = outcome.report["start"], outcome.report["iterations"]
    assert 0 < start["sample"]["flashbacks"] <= 2
    assert start["latent_tasks"]["tasks"] == 3
    assert row["sample"]["trajectories"] == 2 * sum(number != min(hops) for number in hops)
    trained = row["searcher/train"]
    assert trained["flashback/kl"] >= 0 and 0 <= trained["conflicts"] <= 1
    assert row["evaluation"]["push"]["searcher"]["version"] == 1
    # What is served has no increments beside its weights, and is not what was there before.
    models = [weights(run / f"iterations/000{t}/searcher/model") for t in (0, 1)]
    assert models[0].keys() == models[1].keys() == weights(MODEL).keys()
    projection = "model.layers.0.self_attn.o_proj.weight"
    assert not np.array_equal(models[0][projection], models[1][projection])
    assert methods.train(methods.load(None, settings), run, Display()).report == outcome.report


# ---------------------------------------------------------------- two policies

DUET = (str(Path(__file__).with_name("with_test_recipes.py")),)


@dataclass(frozen=True)
class Duet:
    """A finished run of two policies, and what it began with."""

    run: Path
    settings: list[str]
    starts: dict[str, Path]


@pytest.fixture(scope="module")
def duet(world: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Duet:
    at = tmp_path_factory.mktemp("duet")
    starts = {
        "asker": build_model(at / "asker", "Qwen2"),
        "answerer": build_model(at / "answerer", "Llama", vocab_size=280, seed=1, layers=3),
    }
    settings = [
        s for s in overrides(world, index, starts["asker"]) if not s.startswith(("em.", "cold_start."))
    ]
    settings += [
        "recipe=duet",
        f"duet.answerer={starts['answerer']}",
        "duet.iterations=1",
        "learner.num_ranks=1",
    ]
    finish(at / "run", settings, DUET)
    return Duet(at / "run", settings, starts)


def weights(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


@pytest.mark.chaos
def test_two_policies_of_different_kinds_are_sampled_scored_trained_and_pushed(
    duet: Duet, tmp_path: Path
) -> None:
    iteration = duet.run / "iterations/0001"
    evaluation, scores = (
        json.loads((iteration / name).read_text()) for name in ("evaluation.json", "scores.json")
    )
    assert evaluation["scores"]["n"] == 4
    for name, start in duet.starts.items():
        assert evaluation["push"][name]["version"] == 1
        trained, started = weights(iteration / name / "model"), weights(start)
        assert any(not np.array_equal(trained[key], started[key]) for key in trained)
        assert all(value < 0 for value in scores[name])
    finish(duet.run, ["--split", "dev", "--out", str(tmp_path / "again.json")], DUET, "evaluate")
    again, then = (
        pq.read_table(path).column("token_ids").to_pylist()
        for path in (tmp_path / "again.parquet", iteration / "evaluation.parquet")
    )
    assert again == then  # what `evaluate` runs is both trained models


@pytest.mark.chaos
def test_a_kill_between_the_training_of_two_policies_changes_nothing(duet: Duet, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    kill_when(killed, duet.settings, (killed / "iterations/0001/asker/train.json").exists, DUET)
    assert not (killed / "iterations/0001/answerer/train.json").exists()
    finish(killed, duet.settings, DUET)
    ours, theirs = (run / "iterations/0001" for run in (killed, duet.run))
    assert json.loads((ours / "evaluation.json").read_text())["scores"]["n"] == 4
    first, second = (json.loads((at / "scores.json").read_text()) for at in (ours, theirs))
    for name in duet.starts:
        assert first[name] == pytest.approx(second[name], rel=1e-6)
        resumed, undisturbed = weights(ours / name / "model"), weights(theirs / name / "model")
        for key, tensor in undisturbed.items():
            np.testing.assert_array_equal(resumed[key], tensor, err_msg=f"{name} {key}")
