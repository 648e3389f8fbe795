"""`exsearch compare`, on runs as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.record_tables import trajectories_to_table
from pipeline.core.run import RunDirectory, write_table
from pipeline.core.scoring.paired import mcnemar
from tests.pipeline.report_support import evaluated, scores
from tests.pipeline.scores_support import answered, questions, write_evaluation

ASKED = questions(8)
LINES = 200
"""Columns of the terminal: wide enough for every question."""


@pytest.fixture
def runs(folder: Path) -> Path:
    """Runs `a` and `b`: tests of the best and of the cold start, and dev scores of two iterations."""
    for name, best, dev in (
        ("a", "1100h000", ("11000000", "10000000")),
        ("b", "0111h10.", ("0000000.", "11100000")),
    ):
        with RunDirectory(folder / name, load_config(folder / "config.yaml")) as run:
            evaluated(run, *(100 * right.count("1") / 8 for right in dev))
            for t, right in enumerate(dev):
                write_evaluation(run.at(f"{t}/evaluation.parquet"), ASKED, right)
            for test, right in (("best", best), ("cold_start", "00000000")):
                run.once(f"test/{test}", lambda: {"iteration": 0} | scores(40.0))
                write_evaluation(run.at(f"test/{test}.parquet"), ASKED, right)
    return folder


def compared(run_command: Any, *arguments: object) -> dict[str, Any]:
    result = run_command("compare", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.usefixtures("runs")
def test_the_best_models_of_two_runs_on_the_test_questions(run_command: Any) -> None:
    found = compared(run_command, "a", "b")
    assert (found["a"], found["b"]) == ({"run": "a", "model": "best"}, {"run": "b", "model": "best"})
    em = found["all"]["em"]
    assert (em["n"], em["difference"], em["gained"], em["lost"]) == (8, 25.0, 3, 1)
    assert em["p_value"] == mcnemar(3, 1)
    assert set(found["all"]) == {"em", "f1", "accuracy", "gold_recall"}
    assert (set(found["by_hops"]), set(found["by_type"])) == ({"1", "2"}, {"bridge"})
    assert len(found["changed"]) == 4
    assert compared(run_command, "a", "b") == found
    turned = compared(run_command, "b", "a")["all"]["em"]
    assert (turned["difference"], turned["p_value"]) == (-25.0, em["p_value"])


@pytest.mark.usefixtures("runs")
def test_on_dev_the_best_iteration_of_each_run_is_compared(run_command: Any) -> None:
    found = compared(run_command, "a", "b", "--split", "dev")
    assert (found["a"]["model"], found["b"]["model"]) == ("iteration 0", "iteration 1")
    assert found["all"]["em"]["difference"] == 12.5
    other = compared(run_command, "a", "b", "--split", "dev", "--model-a", "1")
    assert other["all"]["em"]["a"] == 12.5


@pytest.mark.usefixtures("runs")
def test_two_models_of_one_run(run_command: Any) -> None:
    found = compared(run_command, "a", "a", "--model-a", "cold_start")
    assert (found["all"]["em"]["a"], found["all"]["em"]["b"]) == (0.0, 25.0)


@pytest.mark.usefixtures("runs")
def test_a_table_of_an_evaluation_is_compared_with_a_run(run_command: Any, folder: Path) -> None:
    write_evaluation(folder / "scores.parquet", ASKED[::-1], "1" * 8)
    found = compared(run_command, "a", "scores.parquet")
    assert (found["b"], found["all"]["em"]["b"]) == ({"run": "scores.parquet", "model": ""}, 100.0)


@pytest.mark.usefixtures("runs")
def test_tables_do_not_say_of_which_split_they_are(run_command: Any, refused: Any) -> None:
    a, b = "a/test/best.parquet", "b/test/best.parquet"
    assert compared(run_command, a, b)["split"] is None
    assert compared(run_command, a, "b")["split"] == "test"
    assert "test questions" not in run_command("compare", a, b).stdout
    assert "is a table of one model; leave out" in refused("compare", a, b, "--model-b", "cold_start")


@pytest.mark.usefixtures("runs")
def test_a_person_sees_tables_and_the_first_questions_that_changed(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(LINES))
    text = run_command("compare", "a", "b").stdout
    (em,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["EM", "8"]]
    assert em[1:5] == ["8", "25.0", "50.0", "+25.0"]
    assert em[-3:] == ["0.625", "3", "1"]
    assert "EM by hops" in text and "EM by type" in text
    assert "4 questions changed, 4 are shown" in text
    assert "Who is 3?" in text and "lost" in text
    few = run_command("compare", "a", "b", "--changed", "2").stdout
    assert "4 questions changed, 2 are shown" in few
    shown = [line.split()[-1] for line in few.splitlines() if "Who is" in line]
    assert shown == ["gained", "lost"]


@pytest.mark.usefixtures("runs")
def test_without_resamples_means_have_no_interval(run_command: Any) -> None:
    found = compared(run_command, "a", "b", "--bootstrap-samples", "0")
    assert found["all"]["f1"]["p_value"] is None
    assert found["all"]["em"]["interval"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "model"), "model is neither a run directory (it has no config.yaml) nor a table"),
        (("a", "nothing"), "nothing is neither a run directory"),
        (("a", "b", "--split", "train"), "--split is train; choose test or dev"),
        (("a", "b", "--model-b", "base"), "b has no test evaluation 'base'; there are best, cold_start"),
        (("a", "b", "--split", "dev", "--model-b", "7"), "b has no dev evaluation '7'; there are 0, 1"),
        (("a", "b", "--split", "dev", "--model-a", "base"), "a has no dev evaluation 'base'; there are 0, 1"),
        (("a", "old.parquet"), "old.parquet was written by an earlier version; score its model again"),
        (("a", "gone.parquet"), "there is no gone.parquet"),
        (
            ("a", "kilt.parquet"),
            "A (a) was scored by evaluation.protocol: exsearch, B (kilt.parquet) by kilt",
        ),
        (("a", "others.parquet"), "do not have the same questions: 8 of 8 ids name others"),
        (
            ("a", "few.parquet"),
            "do not have the same questions: of 8 and 5 they share 5; 'q5' is only in A (a)",
        ),
    ],
)
def test_what_cannot_be_compared(refused: Any, runs: Path, arguments: tuple[str, ...], message: str) -> None:
    write_table(runs / "old.parquet", trajectories_to_table([answered(ASKED[0], "answer 0")]))
    write_evaluation(runs / "others.parquet", questions(8, world=" elsewhere"), "1" * 8)
    write_evaluation(runs / "few.parquet", ASKED[:5], "1" * 5)
    write_evaluation(runs / "kilt.parquet", ASKED, "1" * 8, "kilt")
    assert message in refused("compare", *arguments)


def test_a_run_that_has_not_come_so_far(refused: Any, folder: Path) -> None:
    RunDirectory(folder / "run", load_config(folder / "config.yaml")).__exit__()
    assert "run has no test evaluation 'best'; there is none yet" in refused("compare", "run", "run")
    assert "run has no dev evaluation '0'; there is none yet" in refused(
        "compare", "run", "run", "--split", "dev"
    )
