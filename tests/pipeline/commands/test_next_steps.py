"""The commands that a finished run ends with."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.commands import next_steps as module
from pipeline.commands.next_steps import next_steps


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "command", lambda name: name)


def commands(run: Path, *further: str) -> list[list[str]]:
    lines = next_steps(run, "Who founded it?", further).splitlines()
    assert lines[:2] == ["", "Next:"]
    return [shlex.split(line) for line in lines[2:]]


def test_a_trained_searcher_is_looked_at_asked_and_served(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "one"
    (trained := run / "iterations" / "0001" / "searcher").mkdir(parents=True)
    (trained / "train.json").write_text("{}")

    assert commands(run, "demo") == [
        ["exsearch", "view", str(run)],
        ["exsearch", "ask", "--run", str(run), "Who founded it?"],
        ["exsearch", "serve", "--follow", str(run)],
        ["exsearch", "demo"],
    ]


def test_a_run_without_a_trained_searcher_is_only_looked_at(tmp_path: Path) -> None:
    assert commands(tmp_path) == [["exsearch", "view", str(tmp_path)]]


def test_where_the_program_is_not_on_the_path_its_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.executable", str(Path("env/bin/python").resolve()))
    assert module.command("exsearch") == "env/bin/exsearch"
