"""ExSearch's report, made from what the steps of a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import Config, EmConfig
from pipeline.core.run import RunDirectory, RunFiles, write_json
from pipeline.em_report import em_report, outcome_of
from tests.pipeline.report_support import evaluated, scores
from tests.pipeline.scores_support import questions, write_evaluation

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


# ---------------------------------------------------------------- what is paired


def sampled(
    run: RunDirectory,
    t: int,
    bounds: dict[str, float | None],
    step: str = "sample",
    folder: str = "rollouts",
    **figures: float,
) -> None:
    """An E-step with one trajectory per question, of these log-likelihoods; null is log 0."""
    rows = [
        {
            "id": id_,
            "statistics": {
                "scored": [{"log_likelihood": bound, "per_token": bound}] if bound != 0 else [],
            },
        }
        for id_, bound in bounds.items()
    ]
    half = len(rows) // 2
    for number, members in enumerate((rows[:half], rows[half:])):
        write_json(run.at(f"{t}/{folder}/_{number:06d}.json"), {"files": {}, "tasks": members})
    run.once(f"{t}/{step}", lambda: TRAIN | figures)


def test_the_bound_on_dev_is_of_the_iterations_own_model_and_paired_as_well(run: RunDirectory) -> None:
    evaluated(run, 10.0, 20.0)
    for t, bounds in enumerate(({"d1": -2.0, "d2": -4.0}, {"d1": -1.5, "d2": -2.5})):
        sampled(run, t, bounds, "dev_bound", "dev_samples", likelihood_bound=-3.0 + t)
    sampled(run, 1, {"q1": -1.0, "q2": -1.0})
    report = em_report(run, with_iterations(1))
    (row,) = report["iterations"]
    assert [report["cold_start"]["dev_bound"]["likelihood_bound"], row["dev_bound"]["likelihood_bound"]] == [
        -3,
        -2,
    ]
    assert report["cold_start"]["paired"]["dev_bound"] is None
    assert row["paired"]["dev_bound"] == {"n": 2, "difference": 1.0, "stderr": 0.5, "left_out": 0}
    legend = outcome_of(report).legend
    assert "bound on dev after iteration 0: -3.00 \u00b1 0.50\n" in legend
    assert "bound on dev after iteration 1: -2.00 \u00b1 0.50, +1.00 \u00b1 0.50 to the one before" in legend


def test_the_bounds_change_is_paired_over_the_training_questions_of_both_iterations(
    run: RunDirectory,
) -> None:
    sampled(run, 1, {"q1": -1.0, "q2": -5.0, "q3": -9.0, "q4": None, "q5": 0})
    sampled(run, 2, {"q5": -1.0, "q4": -1.0, "q3": -6.0, "q2": -4.0, "q1": -1.5})
    first, second = em_report(run, with_iterations(2))["iterations"]
    assert first["paired"] == dict.fromkeys(("likelihood_bound", "mean_likelihood", "dev_bound", "dev"))
    changes = [-0.5, 1.0, 3.0]  # q4 was impossible before, and of q5 nothing was scored
    found = second["paired"]["likelihood_bound"]
    assert (found["n"], found["left_out"]) == (3, 1)
    assert found["difference"] == pytest.approx(np.mean(changes))
    assert found["stderr"] == pytest.approx(np.std(changes, ddof=1) / np.sqrt(3))
    means = np.exp([-1.5, -4.0, -6.0, -1.0]) - np.exp([-1.0, -5.0, -9.0, -np.inf])
    assert second["paired"]["mean_likelihood"]["difference"] == pytest.approx(means.mean())


def test_dev_and_test_scores_are_paired_question_by_question(run: RunDirectory) -> None:
    asked = questions(6)
    evaluated(run, 100 * 2 / 6, 100 * 4 / 6)
    for t, right in enumerate(("110000", "101110")):
        write_evaluation(run.at(f"{t}/evaluation.parquet"), asked, right)
    for name, right in (("base", "000000"), ("best", "111111"), ("cold_start", "111000")):
        run.once(f"test/{name}", lambda: {"iteration": 0} | scores(40.0))
        write_evaluation(run.at(f"test/{name}.parquet"), asked, right)
    run.once("1/sample", lambda: dict(TRAIN))

    report = em_report(run, with_iterations(1))

    (row,) = report["iterations"]
    em = row["paired"]["dev"]["em"]
    assert (em["difference"], em["gained"], em["lost"]) == (pytest.approx(100 * 2 / 6), 3, 1)
    assert em["p_value"] == 2 * (1 + 4) / 2**4
    assert [(pair["a"], pair["b"]) for pair in report["paired_tests"]] == [
        ("base", "cold_start"),
        ("base", "best"),
        ("cold_start", "best"),
    ]
    assert report["paired_tests"][1]["em"]["p_value"] == 2 / 2**6
    selection = report["selection"]
    assert [row["iteration"] for row in selection["iterations"]] == [0, 1]
    assert selection["iterations"][0]["p_value"] == em["p_value"]
    assert selection["iterations"][1]["probability_best"] > 0.5


def test_a_run_of_an_earlier_version_has_a_report_without_what_it_did_not_record(run: RunDirectory) -> None:
    config = finished_run(run)
    report = em_report(run, config)
    assert (report["selection"], report["paired_tests"]) == (None, [])
    assert {row["dev_bound"] for row in report["iterations"]} == {None}
    assert all(set(row["paired"].values()) == {None} for row in report["iterations"])
    assert outcome_of(report).legend.endswith("\nmedian to ESS all: not recorded")


def test_a_reader_is_told_what_the_proposals_correction_did(run: RunDirectory) -> None:
    ratio = {
        "trajectories": 80,
        "mean": 0.52,
        "mean_clipped": 0.25,
        "clipped_share": 12.5,
        "effective_sample_size": 20.4,
    }
    config = finished_run(run)
    for number, mean in ((1, 0.52), (2, None)):
        run.forget(f"{number}/sample")
        told = TRAIN | {"proposal_ratio": ratio | {"mean": mean}}
        run.once(f"{number}/sample", lambda told=told: told)  # type: ignore[misc]

    legend = outcome_of(em_report(run, config)).legend

    assert (
        "proposal of iteration 1: mean p/q 0.52, 0.25 where 12.5% are clipped; 80 trajectories count as 20"
        in legend
    )
    assert "proposal of iteration 2: mean p/q beyond all numbers, 0.25" in legend
