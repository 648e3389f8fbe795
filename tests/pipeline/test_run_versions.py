"""Versions of policies: from which one each is trained, and what lies beside it."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.policies import Snapshot
from pipeline.methods import load
from tests.pipeline.test_run import NAMES, opened, train, trained


def test_training_starts_from_the_version_before_on_the_shards_of_the_iteration(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        for t in (1, 2):
            (run.fresh(f"{t}/selector/examples") / f"{t}.parquet").write_bytes(b"")
            train(run, t, "selector")
        assert trained(run, "selector") == [(0, ["1.parquet"], 1), (1, ["2.parquet"], 2)]
        assert trained(run, "generator") == []


def test_a_trained_searcher_has_with_it_how_it_is_asked(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        for name in NAMES:
            train(run, 1, name)
        assert load(run.at("1/searcher/model/agent.json")).agent == run.config.agent
        assert not run.at("1/selector/model/agent.json").exists()


def test_a_policy_that_an_iteration_does_not_train_stays_what_it_was(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        base = run.config.model.path
        train(run, 1, "generator")
        for t in (1, 2, 3):
            train(run, t, "selector")
            run.files.close_iteration(t)
        made = Snapshot(1, str(run.at("1/generator/model")), run.at("1/generator/learner"))
        assert [run.snapshot("generator", t) for t in (0, 1, 3)] == [Snapshot(0, base), made, made]
        assert made.state is not None and made.state.is_dir()
        train(run, 4, "generator")
        assert trained(run, "generator")[-1][0] == 1


def test_a_frozen_policy_is_the_same_version_for_ever(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, "selector")
        run.freeze("generator", run.snapshot("selector", 0))
        train(run, 1, "selector")
        assert run.snapshot("generator", 1) == run.snapshot("selector", 0)
