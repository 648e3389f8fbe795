"""`exsearch export`: what is copied, said of it and published, and what it is asked with afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from pipeline.commands.answerer import settings_of
from pipeline.core.agent_settings import agent_settings
from pipeline.core.models import check_export, write_checksums
from pipeline.core.run import RunDirectory, write_json
from pipeline.methods import load

TAGS = {"think": ["\N{THINKING FACE} ", "'\"\\ <|end|>\n"]}
"""What YAML and JSON write each in their own way."""


def scores(em: float, **other: Any) -> dict[str, Any]:
    return {"n": 40, "em": em, "f1": em + 1, "accuracy": em, "em_interval": [em - 5, em + 5]} | other


@pytest.fixture
def run(folder: Path) -> Path:
    """Of three iterations on the questions of the user's folder; the second is the best, the first did not stay."""
    (folder / "agent.yaml").write_text(
        yaml.safe_dump({"agent": {"tags": TAGS, "max_searches": 3, "select": True}})
    )
    config = load([folder / "config.yaml", folder / "agent.yaml"], ["model.max_length=777"])
    with RunDirectory(folder / "run", config) as files:
        for t, em in enumerate((10.0, 20.0, 30.0, 25.0)):
            files.once(f"{t}/searcher/train", dict)
            files.once(f"{t}/evaluation", lambda em=em: {"scores": {"em": em}})  # type: ignore[misc]
            if t != 1:
                model = files.at(f"{t}/searcher/model")
                shutil.copytree(folder / "model", model)
                (model / "config.json").write_text(json.dumps({"version": t}))
                write_checksums(model)
        report = {
            "cold_start": {"iteration": 0, "dev": scores(10.0)},
            "iterations": [{"iteration": t, "dev": scores(10.0 * (t + 1))} for t in (1, 2)],
            "test": {
                "base": scores(5.0, iteration=-1),
                "best": scores(31.5, iteration=2, gold_recall=70.0, searches=1.5),
            },
            "data": {"questions": {"train": 400, "dev": 40}},
        }
        write_json(files.at("report.json"), report)
    return folder / "run"


def test_the_best_model_is_copied_with_settings_and_card(run_command: Any, run: Path, folder: Path) -> None:
    result = run_command("export", run, "--out", "models/mine")

    assert result.exit_code == 0, result.output
    out = folder / "models" / "mine"
    assert json.loads((out / "config.json").read_text()) == {"version": 2}
    assert (out / "tokenizer.json").is_file() and (out / "model.safetensors").is_file()
    check_export(out)
    assert {path.name for path in out.parent.iterdir()} == {"mine"}
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "base_model" not in head
    assert "# mine\n" in card and "iteration 2, the best by dev questions, seed 0." in card
    assert "| iteration 2 (this model) | 40 | 31.5 (26.5 to 36.5) | 32.5 | 31.5 | 70.0 | 1.50 |" in card
    assert "- train: 400 questions of train.jsonl" in card
    assert str(folder) not in card  # nobody's folders are published


def test_what_is_exported_is_asked_as_it_was_trained(run_command: Any, run: Path, folder: Path) -> None:
    run_command("export", run, "--out", "mine")

    trained, asked = load(run / "config.yaml"), load(settings_of(str(folder / "mine"), None))

    assert asked.agent == trained.agent and asked.agent.tags.think == tuple(TAGS["think"])
    assert asked.model.max_length == 777
    assert asked.retriever.method == trained.retriever.method
    assert settings_of(str(run / "iterations/0002/searcher/model"), None) == run / "config.yaml"


def test_a_model_of_the_hub_brings_its_settings(
    run_command: Any, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command("export", run, "--out", "snapshot")
    monkeypatch.setattr("pipeline.core.agent_settings.local_snapshot", lambda name: folder / "snapshot")
    assert settings_of("somebody/searcher", None) == folder / "snapshot" / "agent.json"


def test_settings_are_of_the_agent_alone(run: Path) -> None:
    assert agent_settings(load(run / "config.yaml")).keys() == {"model", "agent", "retriever"}


def test_an_iteration_is_chosen_by_its_number(run_command: Any, run: Path, folder: Path) -> None:
    (folder / "mine").mkdir()
    assert run_command("export", run, "--out", "mine", "--iteration", 3).exit_code == 0
    assert json.loads((folder / "mine" / "config.json").read_text()) == {"version": 3}
    card = (folder / "mine" / "README.md").read_text()
    assert "iteration 3 (dev questions chose iteration 2)" in card
    assert "(this model)" not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iteration", "1"], "the model of iteration 1 did not stay (storage.keep_last); with a model are 0, 2, 3"),
        (["--iteration", "7"], "iteration 7 of "),
        (["--iteration", "last"], "--iteration last: give the number of an iteration, or best"),
        (["--policy", "critic"], "no such policy; there is searcher"),
        (["--push", "mine"], "--push mine: give NAMESPACE/NAME"),
        (["--out", "model"], "--out model is not empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(refused: Any, run: Path, arguments: list[str], message: str) -> None:
    assert message in refused("export", run, "--out", "mine", *arguments)


def test_a_folder_that_is_no_run(refused: Any) -> None:
    assert "model is not a run directory" in refused("export", "model", "--out", "mine")


def test_a_model_that_was_changed_is_not_exported(refused: Any, run: Path) -> None:
    (run / "iterations/0002/searcher/model/config.json").write_text("{}")
    assert "config.json" in refused("export", run, "--out", "mine")


def test_a_run_whose_start_is_best_has_nothing_to_export(refused: Any, folder: Path) -> None:
    config = load(folder / "config.yaml", ["cold_start.questions=0"])
    with RunDirectory(folder / "other", config) as files:
        files.once("1/searcher/train", dict)
        for t, em in enumerate((10.0, 5.0)):
            files.once(f"{t}/evaluation", lambda em=em: {"scores": {"em": em}})  # type: ignore[misc]
    message = refused("export", "other", "--out", "mine")
    assert "after iteration 0 the searcher of " in message and "/model); with a model are none" in message


def test_a_policy_that_does_not_answer_alone_has_no_settings(
    run_command: Any, run: Path, folder: Path
) -> None:
    for t in (0, 2):
        (run / f"iterations/000{t}/searcher").rename(run / f"iterations/000{t}/selector")
    shutil.rmtree(run / "iterations/0001/searcher")
    shutil.rmtree(run / "iterations/0003/searcher")

    assert run_command("export", run, "--out", "mine").exit_code == 0

    assert not (folder / "mine" / "agent.json").exists()
    card = (folder / "mine" / "README.md").read_text()
    assert "The selector of an agent that searches" in card and "exsearch ask" not in card


def test_of_several_policies_one_must_be_named(refused: Any, run_command: Any, run: Path) -> None:
    shutil.copytree(run / "iterations/0002/searcher", run / "iterations/0002/selector")
    assert "trains searcher and selector; say which one with --policy" in refused(
        "export", run, "--out", "mine"
    )
    assert run_command("export", run, "--out", "mine", "--policy", "selector").exit_code == 0


def test_a_model_is_pushed(
    run_command: Any, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    result = run_command("export", run, "--out", "mine", "--push", "somebody/searcher")

    assert result.exit_code == 0, result.output
    assert "pushed: https://hub/somebody/searcher" in result.output
    assert calls[0] == ("somebody/searcher", {"private": True, "exist_ok": True})
    assert {"README.md", "agent.json", "checksums.json", "config.json", "model.safetensors"} <= {*calls[1][1]}
    assert "# searcher\n" in (folder / "mine" / "README.md").read_text()


def test_what_the_hub_does_not_take_stays(
    run_command: Any, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError("401 Unauthorized", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    result = run_command("export", run, "--out", "mine", "--push", "somebody/searcher")

    assert result.exit_code == 1
    assert "somebody/searcher was not pushed: 401 Unauthorized" in result.stderr
    assert "hf upload somebody/searcher mine" in result.stderr
    assert (folder / "mine" / "agent.json").is_file()
