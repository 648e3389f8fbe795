"""The report of a run of any recipe, made from what its steps left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.config import Config, EmConfig, Iterations
from pipeline.core.report import best_iteration, models_of, scalars, should_stop, step_report
from pipeline.core.run import RunDirectory
from tests.pipeline.report_support import evaluated, scores


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "first", Config())


@pytest.mark.parametrize(
    ("ems", "best"),
    [
        ((10, 20, 30), 2),
        ((10, 30, 20), 1),
        ((30, 20, 10), 0),
        ((10, 30, 30), 1),
        ((5, 5, 5), 0),
        ((), 0),
        ((0,), 0),
    ],
)
def test_the_best_iteration_is_the_earliest_with_the_highest_dev_score(
    run: RunDirectory, ems: tuple[float, ...], best: int
) -> None:
    evaluated(run, *ems)
    assert best_iteration(run, EmConfig(iterations=5)) == best


def test_the_chosen_metric_decides_what_is_best(run: RunDirectory) -> None:
    evaluated(run, 10, 20, 30, f1=(10, 50, 40))
    assert best_iteration(run, EmConfig(select_by="em")) == 2
    assert best_iteration(run, EmConfig(select_by="f1")) == 1


def test_iterations_beyond_the_configured_number_do_not_count(run: RunDirectory) -> None:
    evaluated(run, 10, 20, 30, 40)
    assert best_iteration(run, EmConfig(iterations=2)) == 2


def test_training_stops_after_so_many_iterations_without_a_better_score(run: RunDirectory) -> None:
    ems = [10, 30, 20, 30, 25]
    stops = []
    for t, em in enumerate(ems):
        run.once(f"{t}/evaluation", lambda em=em: {"scores": scores(em)})  # type: ignore[misc]
        stops.append(should_stop(run, t, EmConfig(iterations=9, patience=2)))
    assert stops == [False, False, False, True, True]


def test_without_patience_training_never_stops_early(run: RunDirectory) -> None:
    evaluated(run, 50, 10, 10, 10, 10)
    assert not should_stop(run, 4, EmConfig(iterations=9))


def test_scalars_are_the_numbers_under_dotted_names() -> None:
    tree = {
        "em": 40,
        "push": {"seconds": 0.5, "verified": True, "deep": {"bytes": 3}},
        "name": "x",
        "interval": [1.0, 2.0],
        "nothing": None,
    }
    assert scalars(tree) == {"em": 40.0, "push.seconds": 0.5, "push.deep.bytes": 3.0}


def two_policies(run: RunDirectory) -> Iterations:
    """The selector is trained in iterations 1 and 2, the generator in iteration 1 alone."""
    evaluated(run, 10, 20, 30)
    run.once("1/sample", lambda: {"pairs": 5})
    for step in ("1/selector/train", "1/generator/train", "2/selector/train"):
        run.once(step, lambda: {"loss": 0.5})
    run.once("test/best", lambda: {"iteration": 2} | scores(40.0))
    return Iterations(iterations=3)


def test_the_report_of_any_recipe_has_its_steps_by_name(run: RunDirectory) -> None:
    report = step_report(run, "duo", 7, two_policies(run))
    assert (report["recipe"], report["seed"], report["best_iteration"]) == ("duo", 7, 2)
    assert report["start"]["evaluation"]["scores"] == scores(10)
    first, second = report["iterations"]
    assert set(first) == {"iteration", "sample", "selector/train", "generator/train", "evaluation"}
    assert set(second) == {"iteration", "selector/train", "evaluation"}
    assert report["test"]["best"]["em"] == 40.0


def test_the_report_names_the_best_model_of_each_policy(run: RunDirectory) -> None:
    iterations = two_policies(run)
    assert step_report(run, "duo", 0, iterations)["models"] == {
        "generator": "iterations/0001/generator/model",
        "selector": "iterations/0002/selector/model",
    }
    assert models_of(run, 0) == {}


def test_the_report_of_a_run_that_has_just_begun(run: RunDirectory) -> None:
    report = step_report(run, "duo", 0, Iterations())
    assert (report["start"], report["iterations"], report["models"], report["test"]) == (None, [], {}, {})
