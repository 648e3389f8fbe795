"""`report.json`: one row per iteration, the best one, and the scores on the test questions. Built from the run
directory alone, so it can be made again at any time.

Every recipe has the same report of its steps (`step_report`); ExSearch has one of its own (`pipeline.em_report`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.core.comparison import paired_tests, selection
from pipeline.core.config import EvaluationConfig, Rounds
from pipeline.core.question_scores import Scores, read_scores
from pipeline.core.run import DATA_FILE, Json, RunFiles, read_json

EVALUATION = "evaluation"
"""The step of every recipe that scores an iteration on the dev questions."""
DEV_BOUND = "dev_bound"
"""The step that samples dev questions for their likelihood bound."""
DEV_SAMPLES = "dev_samples"
"""The folder of its trajectories."""
TESTS = ("start", "best")
"""Of a recipe that says nothing else, in their order."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table of iterations: the number at the `path` of a row, its keys divided by dots."""

    name: str
    path: str
    digits: int = 1
    error_path: str | None = None
    """Where the number's standard error is, to show it as well."""
    if_null: str = ""
    """Shown where the report has null: JSON has no infinity."""


STEPS_OF_A_SEARCHER = (
    Column("dev EM", "evaluation.scores.em"),
    Column("dev F1", "evaluation.scores.f1"),
    Column("searches", "evaluation.scores.searches", 2),
    Column("sample s", "sample.seconds", 0),
    Column("train s", "searcher/train.seconds", 0),
)
"""Of a recipe that trains the one policy `searcher`, behind its own columns."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe comes back with: the report, as written to `report.json`, and how to show it.

    `start` is the name and the row of iteration 0, if the report has one; `tests` the order in which tests are shown,
    others come behind them. `details` are the columns of a second table of the iterations, of this title. `tests_table`
    shows the tests of a recipe that scores no answers.
    """

    report: Json
    columns: Sequence[Column]
    legend: str
    start: tuple[str, Json] | None
    tests: Sequence[str] = TESTS
    details: Sequence[Column] = ()
    details_title: str = ""
    tests_table: Table | None = None


def step_outcome(report: Json, columns: Sequence[Column], legend: str = "* best") -> Outcome:
    """Another recipe's report (`step_report`), ready to be shown."""
    row = report["start"]
    return Outcome(report, columns, legend, None if row is None else ("start", row))


def step_report(
    run: RunFiles,
    recipe: str,
    seed: int,
    iterations: Rounds,
    samples: int = EvaluationConfig().bootstrap_samples,
) -> Json:
    """The report as far as the run has come: per iteration what each step found out, under the step's name."""
    rows: list[Json] = [
        {"iteration": t, **steps} for t in range(iterations.iterations + 1) if (steps := run.steps(t))
    ]
    return report_of(run, recipe, seed, iterations, rows, samples, start="start")


def report_of(
    run: RunFiles,
    recipe: str,
    seed: int,
    iterations: Rounds,
    rows: Sequence[Json],
    samples: int,
    *,
    start: str,
    tests: Sequence[str] = TESTS,
) -> Json:
    """What every report has, around its rows; that of iteration 0 stands by itself, under the key `start`.

    `models` are the model directories of the best iteration, by policy, as seen from the run directory;
    `removed_models` the versions whose model did not stay. `selection` (null where scores by question are not recorded)
    and `paired_tests` are as in `pipeline.core.comparison`, with so many `samples`.
    """
    best = best_iteration(run, iterations)
    return {
        "run": run.path.name,
        "recipe": recipe,
        "seed": seed,
        "iterations": [row for row in rows if row["iteration"] > 0],
        "best_iteration": best,
        "select_by": iterations.select_by,
        "models": {name: str(path.relative_to(run.path)) for name, path in models_of(run, best).items()},
        "removed_models": run.removed_models(),
        start: next((row for row in rows if row["iteration"] == 0), None),
        "selection": selection(dev_scores(run, iterations), best, iterations.select_by, samples, seed),
        "test": run.test_results(),
        "paired_tests": paired_tests(_test_scores(run, tests), samples, seed),
        "data": read_json(run.path / DATA_FILE),
    }


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names as far as they are in `order` in that order, the others behind them."""
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def dev_scores(run: RunFiles, iterations: Rounds) -> dict[int, Scores]:
    """By iteration that is scored on dev the scores by question, where they are recorded of all of these; else none."""
    scored = sorted(best_iterations(run, iterations))
    found = {t: read_scores(run.at(f"{t}/{EVALUATION}.parquet")) for t in scored}
    known = {t: scores for t, scores in found.items() if scores is not None}
    return known if len(known) == len(found) else {}


def _test_scores(run: RunFiles, order: Sequence[str]) -> dict[str, Scores]:
    names = in_order(run.test_results(), order)
    found = {name: read_scores(run.at(f"test/{name}.parquet")) for name in names}
    return {name: scores for name, scores in found.items() if scores is not None}


def models_of(run: RunFiles, iteration: int) -> dict[str, Path]:
    """The model directory of each policy after an iteration, if the run had trained it by then."""
    versions = {name: run.newest_version(name, up_to=iteration) for name in run.trained()}
    return {name: run.at(f"{version}/{name}/model") for name, version in versions.items() if version >= 0}


def best_iteration(run: RunFiles, iterations: Rounds) -> int:
    """The iteration with the highest dev score; the earliest of equals; 0 if there are none."""
    return next(iter(best_iterations(run, iterations)), 0)


def best_iterations(run: RunFiles, iterations: Rounds) -> list[int]:
    """Those with a dev score, the best first; of equals the earliest."""
    scores = {t: _dev_score(run, t, iterations) for t in range(iterations.iterations + 1)}
    return best_first({t: score for t, score in scores.items() if score is not None})


def best_first(scores: Mapping[int, float]) -> list[int]:
    """Iterations by their scores; of equals the earliest first."""
    return sorted(scores, key=lambda t: (-scores[t], t))


def should_stop(run: RunFiles, t: int, iterations: Rounds) -> bool:
    """True if the last `patience` iterations up to t brought no better dev score."""
    return iterations.patience is not None and t - best_iteration(run, iterations) >= iterations.patience


def scalars(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries, under dotted names."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _dev_score(run: RunFiles, t: int, iterations: Rounds) -> float | None:
    result = run.finished(f"{t}/{EVALUATION}")
    return None if result is None else result["scores"][iterations.select_by]
