"""The commands beside training: what each refuses and prints, and how a command ends."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup

from pipeline.core.config import Config
from pipeline.core.config.loading import load_config
from pipeline.core.errors import RunError
from pipeline.core.run import RunDirectory
from pipeline.em_report import outcome_of
from tests.pipeline.commands_support import ROOT, TRAIN
from tests.shown import all_commands, check, commands_in

# ---------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "run", "--config", "config.yaml"), "give --run or --config, not both"),
        (("--run", "run"), "run is not a run directory"),
        (
            ("--config", "config.yaml", "--split", "validation"),
            "--split is validation; choose train, dev or test",
        ),
        (("--config", "config.yaml", "--split", "test"), "data.test is empty"),
        (("--config", "config.yaml"), "give --run, or retriever.index=DIR"),
        (("--config", "config.yaml", "--model", "./nothing"), "./nothing does not exist"),
    ],
)
def test_an_evaluation_that_cannot_be_done(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("evaluate", *arguments)


def test_an_evaluation_leaves_the_run_as_it_is(refused: Any, folder: Path) -> None:
    RunDirectory(folder / "run", load_config(folder / "config.yaml"))
    message = refused(
        "evaluate", "--run", "run", "--split", "test", "rollout.workers=2", "agent.max_searches=1"
    )
    assert "data.test is empty" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nothing", "--index", "index"), "./nothing does not exist"),
        (("--model", "model", "--index", "model"), "model is not a built index"),
        ((), "name what answers: --model DIR, or --run RUN"),
        (("--model", "model", "--run", "run"), "give --model or --run, not both"),
        (("--run", "nowhere"), "nowhere is not a run directory"),
        (("--model", "model", "--url", "http://127.0.0.1:1", "--index", "index"), "retriever.url=null"),
    ],
)
def test_a_question_that_cannot_be_asked(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("ask", "Who?", *arguments)


EVALUATE = ("evaluate", "--config", "config.yaml", "--model", "model", "retriever.index=index")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "RAY_ADDRESS",
            "127.0.0.1:1",
            "RAY_ADDRESS names a Ray cluster at 127.0.0.1:1, where nothing answers",
        ),
        ("TMPDIR", "/" + "x" * 90, "set TMPDIR to a shorter folder"),
    ],
)
@pytest.mark.usefixtures("index")
def test_a_machine_that_is_not_fit_for_ray(
    refused: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert message in refused(*EVALUATE)


@pytest.mark.usefixtures("index")
def test_a_working_directory_with_a_package_of_our_name(refused: Any, folder: Path) -> None:
    (folder / "pipeline").mkdir()
    assert "start the command in another directory" in refused(*EVALUATE)


def test_the_status_of_a_run_is_printed(run_command: Any, folder: Path) -> None:
    RunDirectory(folder / "run", load_config(folder / "config.yaml")).__exit__()
    assert "run: not started\n" in run_command("status", "run").stdout
    assert json.loads(run_command("status", "run", "--json").stdout)["state"] == "not started"


def test_the_status_of_something_else(refused: Any) -> None:
    assert "model is not a run directory" in refused("status", "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--out", "world", "--size", "gigantic"),
            "size 'gigantic' is unknown; choose one of small, medium, large",
        ),
        (("--out", "model"), "model"),
        (("--out", "corpus.jsonl"), "corpus.jsonl is not a directory"),
    ],
)
def test_a_world_that_cannot_be_made(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("world", *arguments)


@pytest.mark.parametrize(
    "arguments", [("train", "--no-such-option"), ("no-such-command",), ("index", "search")]
)
def test_a_command_that_does_not_exist(refused: Any, arguments: tuple[str, ...]) -> None:
    assert "Usage" in refused(*arguments)


def test_the_resolved_configuration_is_printed(run_command: Any, folder: Path) -> None:
    arguments = ("config", "--config", "config.yaml", "weighting=uniform")
    expected = load_config(folder / "config.yaml", ["weighting=uniform"])
    assert Config.model_validate(yaml.safe_load(run_command(*arguments).stdout)) == expected
    assert Config.model_validate(json.loads(run_command(*arguments, "--json").stdout)) == expected


COMMANDS = dict(all_commands())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_explains_itself(run_command: Any, name: str) -> None:
    result = run_command(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if not isinstance(command, TyperGroup)]
)
def test_every_command_gives_an_example_of_itself_that_can_be_called(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(ROOT)  # its configs/
    examples = re.findall(r"^Example(?:, [^:]*)?: (.*)$", COMMANDS[name].help, re.MULTILINE)
    shown = [words for example in examples for words in commands_in(example)]
    assert f"exsearch {name}" in [shlex.join(words[: 1 + len(name.split())]) for words in shown]
    for words in shown:
        check(words)


# ---------------------------------------------------------------- how a command ends

REPORT = {"run": "run", "iterations": [], "best_iteration": 0, "cold_start": None, "test": {}}


@pytest.mark.parametrize(("given", "path"), [(("--run", "a/b"), "a/b"), ((), "runs/config")])
def test_training_says_where_the_report_is(
    run_command: Any, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], path: str
) -> None:
    seen = []
    monkeypatch.setattr(
        "pipeline.em.train",
        lambda config, run, display: seen.append((config, run)) or outcome_of(REPORT),
    )
    result = run_command("train", "--config", "config.yaml", *given, "seed=3")
    assert result.exit_code == 0, result.output
    assert f"report: {path}/report.json" in result.stderr
    ((config, run),) = seen
    assert (config.seed, run) == (3, Path(path))


def test_an_interrupted_command_says_how_to_go_on(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.em.train", interrupted)
    result = run_command(*TRAIN)
    assert result.exit_code == 130
    (said,) = result.stderr.splitlines()
    assert said.startswith("error: interrupted by SIGINT; what was finished is kept, go on with: ")
    assert said.endswith(shlex.join(sys.argv[1:]))


def test_an_interrupted_question_promises_nothing(
    run_command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.commands.ask.ask", interrupted)
    result = run_command("ask", "--model", folder / "model", "--index", folder / "index", "who?")
    assert result.exit_code == 130
    assert result.stderr.endswith("\nerror: interrupted by SIGINT\n")


def test_a_failure_that_is_not_the_users_is_not_hidden(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.em.train", broken)
    result = run_command(*TRAIN)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_a_run_that_cannot_go_on_says_why_and_how_to_start_it_again(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RunError("all engines are gone")

    monkeypatch.setattr("pipeline.em.train", lost)
    result = run_command(*TRAIN)
    assert result.exit_code == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: all engines are gone; what was finished is kept, go on with: ")


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, in the checkout."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_exit_codes_of_real_processes(folder: Path) -> None:
    good = process("config", "--config", str(folder / "config.yaml"), "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["cold_start"]["questions"] == 2
    bad = process("config", "em.iteration=2")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "error: unknown configuration key em.iteration; did you mean em.iterations?\n"


def test_a_real_process_refuses_a_bad_corpus(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"id": "a", "text": "Fine."}\nnot json\n')
    corpus, out = folder / "corpus.jsonl", folder / "index"
    result = process("index", "build", "--corpus", str(corpus), "--out", str(out))
    assert result.returncode == 2
    assert f"error: {corpus}:2: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


# ---------------------------------------------------------------- with Ray


@pytest.mark.component
def test_training_refuses_a_bad_corpus_before_anything_is_encoded(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("not json\n")
    overrides = (f"data.root={folder}", f"model.path={folder / 'model'}")
    run = folder / "run"
    result = process("train", "--config", str(folder / "config.yaml"), "--run", str(run), *overrides)
    assert result.returncode == 2, result.stderr
    assert "corpus.jsonl:1: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "index").exists()


@pytest.mark.component
def test_training_refuses_more_ranks_than_the_machine_has(folder: Path, index: Path) -> None:
    overrides = (
        f"data.root={folder}",
        f"model.path={folder / 'model'}",
        f"retriever.index={index}",
        "learner.num_ranks=5000",
    )
    run = folder / "run"
    result = process("train", "--config", str(folder / "config.yaml"), "--run", str(run), *overrides)
    assert result.returncode == 2, result.stderr
    assert "learner.num_ranks is 5000, but the cluster has" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "iterations").exists()
