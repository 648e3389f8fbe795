"""Recipes are found by their name, and each has its own section of the configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import pipeline.recipes
from pipeline import methods
from pipeline.core.config.loading import load_config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.run import RunDirectory

RECIPE = """
from pydantic import Field
from pipeline.core.config import Iterations


class Settings(Iterations):
    strength: float = Field(0.5, gt=0)


def train(config, run_path, display):
    return config.of_recipe.strength, run_path
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One new file where recipes are."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "novel.py").write_text(RECIPE)
    monkeypatch.setattr(pipeline.recipes, "__path__", [*pipeline.recipes.__path__, str(tmp_path / "recipes")])
    monkeypatch.delitem(sys.modules, "pipeline.recipes.novel", raising=False)
    return "novel"


def test_a_new_file_is_a_new_recipe(recipe: str, tmp_path: Path) -> None:
    assert recipe in methods.names()
    config = methods.load(None, ["recipe=novel", "novel.strength=2.5"])
    assert methods.train(config, tmp_path, Display()) == (2.5, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=nove"], "there is no recipe nove; did you mean novel?"),
        (
            ["recipe=xyz"],
            "there is no recipe xyz; there are exsearch, dro, flashback, grpo, novel, preference, toolret",
        ),
        (["recipe=novel", "novel.strenght=1"], "configuration key novel.strenght; did you mean novel.strength?"),
        (["recipe=novel", "novel.strength=0"], "configuration key novel.strength: input should be greater than 0"),
        (["novel.strength=1"], "novel is of the recipe novel, but the recipe is exsearch; set recipe=novel"),
        (["recipe=novel", "dro.chosen=2"], "the section dro is of the recipe dro, but the recipe is novel"),
        (["recipe=novel", "em.iterations=2"], "em is a section of the recipe exsearch and says nothing to novel"),
        (["recipe=novel", "weighting=posterior"], "weighting is a section of the recipe exsearch"),
        (["recipe=preference", "em.patience=2"], "em is a section of the recipe exsearch"),
    ],
)  # fmt: skip
def test_what_says_nothing_to_the_recipe_is_refused(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        methods.load(None, overrides)
    assert message in str(refused.value)


def test_a_recipe_may_read_sections_of_exsearch() -> None:
    config = methods.load(None, ["recipe=preference", "cold_start.questions=16"])
    assert config.cold_start.questions == 16


def test_where_exsearch_alone_is_known_another_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="takes the recipe exsearch only"):
        load_config(None, ["recipe=preference"])


def test_a_printed_configuration_can_be_read_again(recipe: str, tmp_path: Path) -> None:
    config = methods.load(None, ["recipe=novel", "novel.strength=2.5", "seed=3"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert methods.load(path).model_dump() == config.model_dump()


# ---------------------------------------------------------------- the run directory of a recipe


def start(path: Path, *overrides: str) -> None:
    """The run's command once more; its process has come to an end by the next."""
    with RunDirectory(path, methods.load(None, ["recipe=novel", *overrides])) as run:
        run.once("1/sample", dict)


def test_a_run_of_a_recipe_may_go_on_for_longer_but_not_otherwise(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, "novel.iterations=2")
    start(run, "novel.iterations=4", "novel.patience=1")
    with pytest.raises(UserError, match=r"novel\.strength: 0\.5 -> 2\.0"):
        start(run, "novel.strength=2")
    with pytest.raises(UserError, match="holds a run of the recipe novel, not exsearch"):
        RunDirectory(run, methods.load(None))


def test_model_directories_of_a_recipe_hold_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selector").mkdir()
    overrides = ("recipe=dro", "dro.generator=somebody/model", "data.root=/")
    monkeypatch.chdir(tmp_path)
    with RunDirectory(tmp_path / "run", methods.load(None, [*overrides, "dro.selector=selector"])) as run:
        run.once("1/sample", dict)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["dro"]["selector"] == str(tmp_path / "selector")
    assert stored["dro"]["generator"] == "somebody/model"
    monkeypatch.chdir("/")
    RunDirectory(tmp_path / "run", methods.load(None, [*overrides, f"dro.selector={tmp_path / 'selector'}"]))
