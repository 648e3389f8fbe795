"""The process of one run: how it stands, why it failed, and that it ends in order with the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands.experiment_run import how_it_stands, run_in_process
from pipeline.core.config import Config
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import Arm
from pipeline.core.progress import ProgressFile


@pytest.fixture
def run(tmp_path: Path) -> PlannedRun:
    return PlannedRun(Arm("a", "a"), 0, tmp_path / "seed-0", tmp_path / "config.yaml", (), Config(), None)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of Python; a test writes it."""
    path = tmp_path / "program"
    path.touch(mode=0o755)
    monkeypatch.setattr("pipeline.commands.experiment_run.sys.executable", str(path))
    monkeypatch.setattr("pipeline.commands.experiment_run.POLL_S", 0.02)
    return path


def test_a_run_is_given_its_directory_and_what_it_prints_is_logged(run: PlannedRun, program: Path) -> None:
    program.write_text('#!/bin/sh\necho "$@"\n')
    assert run_in_process(run, lambda words: None) is None
    logged = run.path.with_name("seed-0.log").read_text()
    assert logged == f"-m pipeline.cli train --config {run.file} --run {run.path}\n"


def test_a_run_that_fails_gives_its_exit_code_its_error_and_its_log(run: PlannedRun, program: Path) -> None:
    program.write_text("#!/bin/sh\necho error: no such model >&2\necho and more\nexit 2\n")
    log = run.path.with_name("seed-0.log")
    assert run_in_process(run, lambda words: None) == f"exit code 2, error: no such model; see {log}"
    program.write_text("#!/bin/sh\necho Killed\nexit 137\n")
    assert run_in_process(run, lambda words: None) == f"exit code 137, Killed; see {log}"
    assert "no such model" in log.read_text()


def test_an_interrupted_run_is_told_to_end_and_waited_for(run: PlannedRun, program: Path) -> None:
    program.write_text(
        "#!/bin/sh\ntrap 'echo ends in order; exit 143' TERM\necho begins\nwhile true; do sleep 0.02; done\n"
    )
    log = run.path.with_name("seed-0.log")

    def interrupt(words: str) -> None:
        if "begins" in log.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(run, interrupt)
    assert log.read_text() == "begins\nends in order\n"


def test_how_a_run_stands_is_its_phase(tmp_path: Path) -> None:
    assert how_it_stands(tmp_path) == "starting"
    with ProgressFile(tmp_path / "progress.json").phase("iteration 1: sampling", 400, "questions", 120):
        assert how_it_stands(tmp_path) == "iteration 1: sampling, 120 of 400 questions"
    (tmp_path / "progress.json").write_text("{")
    assert how_it_stands(tmp_path) == "starting"
