"""ExSearch's report, made from what the steps of a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import Config, EmConfig
from pipeline.core.run import RunDirectory, RunFiles, write_json
from pipeline.em_report import em_report, outcome_of
from tests.pipeline.report_support import evaluated, scores

TRAIN = {
    "questions": 2,
    "likelihood_bound": -3.0,
    "likelihood_bound_stderr": 0.5,
    "effective_sample_size": 2.5,
    "all_failed_share": 50.0,
    "excluded": 1,
    "stop_reasons": {"answered": 7, "engine_error": 1},
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "first", Config())


def with_iterations(number: int, **em: Any) -> Config:
    return Config(em=EmConfig(iterations=number, **em))


def finished_run(run: RunDirectory, iterations: int = 2) -> Config:
    run.once("0/cold_start", lambda: {"trajectories": 64, "skipped": {}})
    for t in range(1, iterations + 1):
        run.once(f"{t}/sample", lambda: dict(TRAIN))
    for t in range(iterations + 1):
        run.once(f"{t}/searcher/train", lambda: {"loss": 1.5, "steps": 3})
    evaluated(run, *(10.0 * (t + 1) for t in range(iterations + 1)))
    for name, version in (("base", -1), ("cold_start", 0), ("one_search", 0), ("best", iterations)):
        run.once(f"test/{name}", lambda version=version: {"iteration": version} | scores(40.0))  # type: ignore[misc]
    return with_iterations(iterations)


def test_the_report_of_a_finished_run(run: RunDirectory) -> None:
    report = em_report(run, finished_run(run))
    assert report["run"] == "first"
    assert report["best_iteration"] == 2
    assert set(report["test"]) == {"base", "one_search", "cold_start", "best"}
    assert report["test"]["best"]["em"] == 40.0
    assert [row["iteration"] for row in report["iterations"]] == [1, 2]
    row = report["iterations"][0]
    assert set(row["phase_seconds"]) == {"expectation", "maximisation", "evaluation"}
    assert all(seconds >= 0 for seconds in row["phase_seconds"].values())
    assert row["train"] == TRAIN
    assert row["learner"] == {"loss": 1.5, "steps": 3}
    assert row["dev"] == scores(20.0)
    assert row["push"] == {"seconds": 0.1}
    assert report["models"] == {"searcher": "iterations/0002/searcher/model"}
    assert (report["select_by"], report["weighting"], report["seed"]) == ("em", "likelihood", 0)


def test_the_cold_start_is_a_row_of_its_own(run: RunDirectory) -> None:
    report = em_report(run, finished_run(run))
    assert report["cold_start"]["iteration"] == 0
    assert report["cold_start"]["train"]["trajectories"] == 64
    assert report["cold_start"]["dev"] == scores(10.0)


def test_the_report_survives_json(run: RunDirectory, tmp_path: Path) -> None:
    report = em_report(run, finished_run(run))
    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_report_of_a_run_that_has_just_begun(run: RunDirectory) -> None:
    report = em_report(run, Config())
    assert report["iterations"] == []
    assert report["cold_start"] is None
    assert report["best_iteration"] == 0
    assert report["test"] == {}


def test_an_iteration_is_reported_as_far_as_it_has_come(run: RunDirectory) -> None:
    evaluated(run, 10.0)
    run.once("1/sample", lambda: dict(TRAIN))
    (row,) = em_report(run, with_iterations(3))["iterations"]
    assert set(row["phase_seconds"]) == {"expectation"}
    assert row["dev"] is None
    assert row["learner"] == {}


def test_a_report_can_be_made_again_and_is_the_same(run: RunDirectory) -> None:
    config = finished_run(run)
    assert em_report(run, config) == em_report(RunFiles(run.path), config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "the model itself"),
        (
            {"rollout": {"temperature": 0.8, "top_p": 0.95}},
            "temperature 0.8, top_p 0.95, top_k 0; not corrected",
        ),
        (
            {"rollout": {"top_k": 20}, "weighting": {"correct_proposal": True}},
            "temperature 1, top_p 1, top_k 20; corrected by the clipped ratio p/q",
        ),
        (
            {"em": {"hinted": 1}, "weighting": {"correct_proposal": True}},
            "the model itself, 1 of 4 with a hint; corrected by the clipped ratio p/q",
        ),
    ],
)
def test_the_report_says_what_the_trajectories_were_sampled_from(
    run: RunDirectory, settings: dict[str, Any], expected: str
) -> None:
    assert em_report(run, Config.model_validate(settings))["proposal"] == expected


def test_a_reader_is_told_how_much_the_engines_had_cached(run: RunDirectory) -> None:
    use = {"prompt_tokens": 1000, "cache_hits": 87.4, "preemptions": 3}
    config = finished_run(run)
    run.forget("2/sample")
    run.once("2/sample", lambda: TRAIN | {"engines": {"searcher": use}})

    legend = outcome_of(em_report(run, config)).legend

    assert legend.endswith("last E-step: 87% of prompt tokens were in the engines' cache, 3 preemptions")
