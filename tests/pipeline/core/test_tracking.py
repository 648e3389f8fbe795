"""The metrics stream through kills and resumes. W&B and MLflow are stood in for by small fakes."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.core.config import TrackingConfig
from pipeline.core.errors import UserError
from pipeline.core.tracking import Tracker

PLAIN = TrackingConfig(tensorboard=False)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_metric_is_one_complete_line_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, PLAIN, "run")
    tracker.log({"loss": 0.5, "tokens": 12}, iteration=1, phase="train", step=3)
    (line,) = lines(tmp_path)
    assert set(line) == {"time", "wall_s", "iteration", "phase", "step", "values"}
    assert (line["iteration"], line["phase"], line["step"]) == (1, "train", 3)
    assert line["values"] == {"loss": 0.5, "tokens": 12.0}
    tracker.close()


def test_a_resumed_run_continues_the_file_and_its_wall_time(tmp_path: Path) -> None:
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"em": 40.0}, iteration=0, phase="evaluate")
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"wall_s": 0.', '"wall_s": 1000.'))
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"em": 50.0}, iteration=1, phase="evaluate")
    assert [line["values"]["em"] for line in lines(tmp_path)] == [40.0, 50.0]
    assert lines(tmp_path)[1]["wall_s"] >= 1000


def test_a_line_that_a_kill_cut_off_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"loss": 1.0}, iteration=1, phase="train", step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"loss": 2.0}, iteration=1, phase="train", step=1)
    assert "incomplete last line" in caplog.text
    assert [line["values"]["loss"] for line in lines(tmp_path)] == [1.0, 2.0]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"bound": -3.0}, iteration=1, phase="rollouts")
    whole = (tmp_path / "metrics.jsonl").read_text()
    for damaged in ("nonsense", "{}", whole.strip().replace("-3.0", '"low"')):
        (tmp_path / "metrics.jsonl").write_text(f"{whole}{damaged}\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
            Tracker(tmp_path, PLAIN, "run")


def test_repeating_a_phase_after_rollback_writes_its_metrics_once(tmp_path: Path) -> None:
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        tracker.log({"bound": -3.0}, iteration=1, phase="rollouts")
        tracker.log({"loss": 1.0}, iteration=1, phase="train", step=0)
        tracker.log({"loss": 0.9}, iteration=1, phase="train", step=1)
    with Tracker(tmp_path, PLAIN, "run") as tracker:
        assert tracker.rollback(1, "train") == 2
        assert tracker.rollback(1, "train") == 0
        tracker.log({"loss": 1.0}, iteration=1, phase="train", step=0)
    assert [(line["phase"], line["step"]) for line in lines(tmp_path)] == [("rollouts", None), ("train", 0)]


def test_a_value_that_is_not_finite_is_null_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(tmp_path, TrackingConfig(), "run") as tracker:
        tracker.log({"loss": math.nan, "norm": math.inf, "lr": 0.1}, iteration=1, phase="train", step=0)
    assert lines(tmp_path)[0]["values"] == {"loss": None, "norm": None, "lr": 0.1}
    assert "loss" in caplog.text
    assert "norm" in caplog.text


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_what_the_file_holds_after_resume_and_rollback(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(), "run") as tracker:
        for iteration in (1, 2):
            tracker.log({"em": 10.0 * iteration}, iteration=iteration, phase="evaluate")
            for step in range(2):
                tracker.log({"loss": iteration + step / 10}, iteration=iteration, phase="train", step=step)
    with Tracker(tmp_path, TrackingConfig(), "run") as tracker:
        tracker.rollback(2, "train")
        tracker.log({"loss": 5.0}, iteration=2, phase="train", step=0)
    assert scalars(tmp_path, "evaluate/em") == [(1, 10.0), (2, 20.0)]
    assert scalars(tmp_path, "train/loss") == [(0, 1.0), (1, pytest.approx(1.1)), (2, 5.0)]


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("wandb", TrackingConfig(wandb_project="p", tensorboard=False)),
        ("mlflow", TrackingConfig(mlflow_experiment="e", tensorboard=False)),
    ],
)
def test_a_missing_package_is_refused_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, config: TrackingConfig
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'exsearch\[{package}\]'"):
        Tracker(tmp_path / "run", config, "run")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_every_metric_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inits: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        inits.append(arguments)
        return SimpleNamespace(id="abc", log=logged.append, finish=lambda: logged.append({"finished": 1}))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = TrackingConfig(tensorboard=False, wandb_project="searchers")
    for value in (1.0, 2.0):
        with Tracker(tmp_path, config, "night run") as tracker:
            tracker.log({"loss": value}, iteration=1, phase="train", step=4)
    assert [(a["project"], a["name"], a["id"]) for a in inits] == [
        ("searchers", "night run", None),
        ("searchers", "night run", "abc"),
    ]
    assert [entry["train/loss"] for entry in logged if "train/loss" in entry] == [1.0, 2.0]
    assert logged[0]["iteration"] == 1
    assert logged[1] == {"finished": 1}


def test_mlflow_gets_every_metric_on_one_axis_over_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str | None] = []
    logged: list[tuple[dict[str, float], int]] = []

    def start_run(run_id: str | None, run_name: str) -> Any:
        runs.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    fake = SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_metrics=lambda values, step: logged.append((values, step)),
        end_run=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    config = TrackingConfig(tensorboard=False, mlflow_experiment="searchers")
    for iteration in (1, 2):
        with Tracker(tmp_path, config, "run") as tracker:
            tracker.log({"loss": 1.0}, iteration=iteration, phase="train", step=0)
            tracker.log({"em": 40.0}, iteration=iteration, phase="evaluate")
    assert runs == [None, "r1"]
    assert [step for _, step in logged] == [0, 1, 1, 2]
