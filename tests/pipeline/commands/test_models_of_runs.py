"""Which model of a run is evaluated or asked, and which configuration and index are found for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import answerer
from pipeline.commands.answerer import agent_of, best_model, settings_line, settings_of
from pipeline.commands.evaluate import evaluate_model
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.policies import Snapshot
from pipeline.core.run import RunDirectory
from pipeline.methods import load


def run_of(path: Path, *overrides: str, steps: tuple[str, ...] = (), scores: tuple[float, ...] = ()) -> Path:
    """A run whose iterations 0, 1, ... have these dev scores."""
    with RunDirectory(path, load(None, overrides)) as run:
        for step in steps:
            run.once(step, dict)
        for t, em in enumerate(scores):
            run.once(f"{t}/evaluation", lambda em=em: {"scores": {"em": em}})  # type: ignore[misc]
    return path


def evaluated(run: Path, monkeypatch: pytest.MonkeyPatch, model: str | None = None) -> list[str]:
    """The models that `evaluate --run` takes; it ends because there are no questions."""
    taken: list[str] = []
    monkeypatch.setattr("pipeline.commands.evaluate.check_models", taken.extend)
    with pytest.raises(UserError, match=r"data\.dev is empty"):
        evaluate_model(None, [], run=run, model=model, split="dev", out=None, display=Display())
    return taken


SEARCHER = ("0/searcher/train", "1/searcher/train", "2/searcher/train")


@pytest.mark.parametrize("recipe", ["exsearch", "preference"])
def test_the_best_searcher_of_a_run_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    run = run_of(tmp_path / "run", f"recipe={recipe}", steps=SEARCHER, scores=(10, 30, 20))
    assert evaluated(run, monkeypatch) == [str(run / "iterations/0001/searcher/model")]


def test_a_run_whose_start_is_best_gives_what_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", "model.path=a/base", steps=SEARCHER[1:], scores=(30, 20, 10))
    assert evaluated(run, monkeypatch) == ["a/base"]


def test_models_that_answer_together_are_evaluated_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("recipe=dro", "model.path=a/base", "dro.generator=a/generator")
    run = run_of(tmp_path / "run", *overrides, steps=("1/selector/train",), scores=(10, 20))
    assert evaluated(run, monkeypatch) == [str(run / "iterations/0001/selector/model"), "a/generator"]
    assert evaluated(run, monkeypatch, model="b/searcher") == ["b/searcher"]


def test_a_run_of_models_that_nobody_knows_how_to_ask_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", steps=("1/critic/train",), scores=(10, 20))
    with pytest.raises(UserError, match="has trained critic, and its recipe does not say how they answer"):
        evaluate_model(None, [], run=run, model=None, split="dev", out=None, display=Display())


def test_a_model_is_asked_with_the_configuration_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run = run_of(tmp_path / "run", steps=SEARCHER)
    assert settings_of(str(run / "iterations/0001/searcher/model"), None) == run / "config.yaml"
    (run / "index").mkdir()
    assert settings_of(str(run / "index"), None) is None
    assert settings_of("somebody/model", None) is None
    assert settings_of(None, run) == run / "config.yaml"
    assert "default settings" in settings_line("somebody/model", None)


def test_the_best_searcher_of_a_run_is_asked(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "model.path=a/base", steps=SEARCHER, scores=(10, 30, 20))
    assert best_model(run, load(run / "config.yaml")) == str(run / "iterations/0001/searcher/model")
    start = run_of(tmp_path / "start", "model.path=a/base", steps=SEARCHER[1:], scores=(30, 20, 10))
    assert best_model(start, load(start / "config.yaml")) == "a/base"
    other = run_of(
        tmp_path / "other", "recipe=dro", "dro.generator=g", steps=("1/selector/train",), scores=(1, 2)
    )
    with pytest.raises(UserError, match="has trained selector, and no searcher that could be asked"):
        best_model(other, load(other / "config.yaml"))


def test_a_run_that_has_trained_nothing_is_not_asked_as_if_it_had(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "model.path=a/base", steps=())
    with pytest.raises(
        UserError, match="has trained no model yet; go on with it, or name what it starts from"
    ):
        best_model(run, load(run / "config.yaml"))


def test_where_nothing_else_is_named_the_index_of_the_models_run_is_searched(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(answerer, "searchable", lambda retriever, path: opened.append(path))
    monkeypatch.setattr(answerer, "check_models", lambda models: None)
    run = run_of(tmp_path / "run")
    (run / "index").mkdir()
    model = run / "iterations/0001/searcher/model"
    model.mkdir(parents=True)
    for config in (load(None, []), load(None, ["retriever.index=named"])):
        agent_of(Snapshot(0, str(model)), answerer.run_of(str(model)), None, config, Display())
    assert opened == [run / "index", Path("named")]


@pytest.mark.parametrize("command", [lambda run: settings_of(str(run / "iterations/0001/model"), None),
                                     lambda run: evaluate_model(None, [], run=run, model=None, split="dev", out=None,
                                                                display=Display())])  # fmt: skip
def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path, command: Any) -> None:
    run = run_of(tmp_path / "run")
    (run / "iterations/0001/model").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run of an earlier version"):
        command(run)
