"""`report.json`: one row per iteration, the best one, and the scores on the test questions. Built from the run
directory alone, so it can be made again at any time.

Every recipe has the same report of its steps (`step_report`); ExSearch has the one that docs/formats.md describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.agents.program import Sampling
from pipeline.core.config import Config, Iterations
from pipeline.core.run import Json, RunFiles

SCORES = ("em", "f1", "accuracy")
EVALUATION = "evaluation"
"""The step of every recipe that scores an iteration on the dev questions."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table of iterations: the number at the `path` of a row, its keys divided by dots."""

    name: str
    path: str
    digits: int = 1
    error_path: str | None = None
    """Where the number's standard error is, to show it as well."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe comes back with: the report, as written to `report.json`, and how to show it.

    `start` is the name and the row of iteration 0, if the report has one.
    """

    report: Json
    columns: Sequence[Column]
    legend: str
    start: tuple[str, Json] | None


EXSEARCH_COLUMNS = (
    Column("bound", "train.likelihood_bound", 2, "train.likelihood_bound_stderr"),
    Column("ESS", "train.effective_sample_size", 2),
    Column("failed", "train.all_failed_share"),
    Column("dev EM", "dev.em"),
    Column("dev F1", "dev.f1"),
    Column("searches", "dev.searches", 2),
    Column("E-step", "phase_seconds.expectation", 0),
    Column("M-step", "phase_seconds.maximisation", 0),
)
EXSEARCH_LEGEND = (
    "bound: mean log p(answer) with its standard error; times in seconds; * best;\n"
    "failed: % of questions without a right trajectory"
)


def exsearch_outcome(report: Json) -> Outcome:
    """ExSearch's report, ready to be shown."""
    row = report["warm_up"]
    name = "warm-up" if row is not None and "maximisation" in row["phase_seconds"] else "base"
    return Outcome(report, EXSEARCH_COLUMNS, EXSEARCH_LEGEND, None if row is None else (name, row))


def step_outcome(report: Json, columns: Sequence[Column], legend: str = "* best") -> Outcome:
    """Another recipe's report (`step_report`), ready to be shown."""
    row = report["start"]
    return Outcome(report, columns, legend, None if row is None else ("start", row))


def step_report(run: RunFiles, recipe: str, seed: int, iterations: Iterations) -> Json:
    """The report as far as the run has come: per iteration what each step found out, under the step's name."""
    rows: list[Json] = [
        {"iteration": t, **steps} for t in range(iterations.iterations + 1) if (steps := run.steps(t))
    ]
    return {
        "run": run.path.name,
        "recipe": recipe,
        "iterations": [row for row in rows if row["iteration"] > 0],
        "best_iteration": best_iteration(run, iterations),
        "select_by": iterations.select_by,
        "seed": seed,
        "start": next((row for row in rows if row["iteration"] == 0), None),
        "test": run.test_results(),
    }


def exsearch_report(run: RunFiles, config: Config) -> Json:
    """The report as far as the run has come. Scores are percentages, times seconds.

    `iterations` has the EM iterations (1, 2, ...); `warm_up` is iteration 0; `proposal` says whether trajectories were
    sampled from the model itself, from another distribution, or corrected for that.
    """
    rows = [row for t in range(config.em.iterations + 1) if (row := _em_row(run, t)) is not None]
    return {
        "run": run.path.name,
        "recipe": config.recipe,
        "iterations": [row for row in rows if row["iteration"] > 0],
        "best_iteration": best_iteration(run, config.em),
        "select_by": config.em.select_by,
        "weighting": config.weighting.method,
        "proposal": _proposal(config),
        "seed": config.seed,
        "warm_up": next((row for row in rows if row["iteration"] == 0), None),
        "test": run.test_results(),
    }


def best_iteration(run: RunFiles, iterations: Iterations) -> int:
    """The iteration with the highest dev score; the earliest of equals; 0 if there are none."""
    scores = {t: _dev_score(run, t, iterations) for t in range(iterations.iterations + 1)}
    known = {t: score for t, score in scores.items() if score is not None}
    return max(known, key=lambda t: (known[t], -t), default=0)


def should_stop(run: RunFiles, t: int, iterations: Iterations) -> bool:
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


def _dev_score(run: RunFiles, t: int, iterations: Iterations) -> float | None:
    result = run.finished(f"{t}/{EVALUATION}")
    return None if result is None else result["scores"][iterations.select_by]


_EM_STEPS = {
    "expectation": ("cold_start", "sample"),
    "maximisation": ("searcher/train",),
    "evaluation": (EVALUATION,),
}
"""What the report calls the steps of an EM iteration."""


def _em_row(run: RunFiles, t: int) -> Json | None:
    """One iteration's figures, as soon as its first step is finished."""
    steps = run.steps(t)
    phases = {phase: steps[name] for phase, names in _EM_STEPS.items() for name in names if name in steps}
    if not phases:
        return None
    evaluation = phases.get("evaluation", {})
    return {
        "iteration": t,
        "phase_seconds": {name: result["seconds"] for name, result in phases.items()},
        "train": {name: value for name, value in phases.get("expectation", {}).items() if name != "seconds"},
        "learner": {
            name: value for name, value in phases.get("maximisation", {}).items() if name != "seconds"
        },
        "push": evaluation.get("push", {}).get("searcher"),
        "dev": evaluation.get("scores"),
    }


def _proposal(config: Config) -> str:
    rollout = config.rollout
    if Sampling.of(rollout, 0).is_from_the_model:
        return "the model itself"
    settings = f"temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, top_k {rollout.top_k}"
    how = "corrected by the clipped ratio p/q" if config.weighting.correct_proposal else "not corrected"
    return f"{settings}; {how}"
