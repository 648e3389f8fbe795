"""Which models and learner checkpoints stay, over kills, and that none goes that something needs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import Config, EmConfig, StorageConfig
from pipeline.core.report import step_report
from pipeline.core.retention import remove_what_need_not_stay
from pipeline.core.run import RunDirectory, write_atomically
from pipeline.core.status import run_status
from tests.pipeline.report_support import scores

ITERATIONS = EmConfig(iterations=9)


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the program catches it."""


def kill(*_: object, **__: object) -> Any:
    raise Killed


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run", Config())


def train(run: RunDirectory, t: int, *policies: str) -> None:
    for policy in policies or ("searcher",):
        for name in ("model/weights", "learner/a/state"):
            write_atomically(run.at(f"{t}/{policy}/{name}"), f"{policy} {t}")
        run.once(f"{t}/{policy}/train", dict)


def iterate(run: RunDirectory, dev: Sequence[float], storage: StorageConfig) -> None:
    """Iterations with these dev scores, each trained, evaluated and ended."""
    for t, em in enumerate(dev):
        train(run, t)
        run.once(f"{t}/evaluation", lambda em=em: {"scores": scores(em)})  # type: ignore[misc]
        remove_what_need_not_stay(run, t, ITERATIONS, storage)


def having(run: RunDirectory, name: str, policy: str = "searcher") -> list[int]:
    return [int(path.parts[-3]) for path in sorted(run.path.glob(f"iterations/*/{policy}/{name}"))]


def test_by_default_all_models_stay_and_the_learner_checkpoint_of_the_last_version(run: RunDirectory) -> None:
    iterate(run, [10, 20, 30], StorageConfig())
    assert (having(run, "model"), having(run, "learner")) == ([0, 1, 2], [2])
    assert run.removed_models() == {}


@pytest.mark.parametrize(
    ("storage", "models", "states"),
    [
        ({"keep_last": 1}, [0, 2, 5], [5]),
        ({"keep_last": 2}, [0, 2, 4, 5], [5]),
        ({"keep_last": 1, "keep_best": 2}, [0, 2, 3, 5], [5]),
        ({"keep_last": 1, "keep_best": 9}, [0, 1, 2, 3, 4, 5], [5]),
        ({"keep_states": 3}, [0, 1, 2, 3, 4, 5], [3, 4, 5]),
    ],
)
def test_the_last_and_the_best_models_stay_and_that_of_iteration_0(
    run: RunDirectory, storage: dict[str, Any], models: list[int], states: list[int]
) -> None:
    iterate(run, [50, 10, 90, 80, 20, 30], StorageConfig(**storage))
    assert (having(run, "model"), having(run, "learner")) == (models, states)
    assert sorted([*run.removed_models().get("searcher", []), *models]) == list(range(6))


def test_what_went_is_in_the_log_the_report_and_the_status_and_the_scores_stay(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    iterate(run, [50, 10, 90, 80], StorageConfig(keep_last=1))
    assert "models of searcher that were removed: 1; those of 0, 2 stay" in caplog.text
    report = step_report(run, "exsearch", 0, ITERATIONS)
    assert report["removed_models"] == run_status(run.path)["removed_models"] == {"searcher": [1]}
    assert [row["evaluation"]["scores"]["em"] for row in report["iterations"]] == [10, 90, 80]
    assert report["models"] == {"searcher": "iterations/0002/searcher/model"}


def test_a_version_that_later_iterations_still_use_stays(run: RunDirectory) -> None:
    train(run, 0, "searcher", "critic")
    train(run, 1, "critic")
    for t in (2, 3, 4):
        train(run, t)
        remove_what_need_not_stay(run, t, ITERATIONS, StorageConfig(keep_last=1))
    assert (having(run, "model", "critic"), having(run, "learner", "critic")) == ([0, 1], [1])


def test_a_training_in_progress_is_not_touched(run: RunDirectory) -> None:
    train(run, 0)
    train(run, 1)
    write_atomically(run.at("2/searcher/learner/a/state"), "within a training")
    remove_what_need_not_stay(run, 1, ITERATIONS, StorageConfig(keep_last=1))
    assert having(run, "learner") == [1, 2]


@pytest.mark.parametrize("killed_in", [(os, "replace"), (shutil, "rmtree")])
def test_a_kill_leaves_a_model_whole_or_leaves_none_and_the_next_time_the_rest_goes(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, killed_in: tuple[Any, str]
) -> None:
    for t in range(3):
        train(run, t)
    storage = StorageConfig(keep_last=1)
    with monkeypatch.context() as patched:
        patched.setattr(*killed_in, kill)
        with pytest.raises(Killed):
            remove_what_need_not_stay(run, 2, ITERATIONS, storage)
    for t in having(run, "model"):
        assert run.at(f"{t}/searcher/model/weights").read_text() == f"searcher {t}"
    remove_what_need_not_stay(run, 2, ITERATIONS, storage)
    assert (having(run, "model"), having(run, "learner")) == ([0, 2], [2])
    assert [path for path in run.path.rglob(".*") if path.is_dir()] == []
