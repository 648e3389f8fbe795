"""`report.json`: one row per EM iteration, the best one, and the scores on the test questions. Built from the run
directory alone, so it can be made again at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.config import Config, EmConfig
from pipeline.core.run import Json, RunFiles

SCORES = ("em", "f1", "accuracy")
PHASES = ("expectation", "maximisation", "evaluation")


def build_report(run: RunFiles, config: Config) -> Json:
    """The report as far as the run has come. Scores are percentages, times seconds.

    `iterations` has the EM iterations (1, 2, ...); `warm_up` is iteration 0; `proposal` says whether trajectories were
    sampled from the model itself, from another distribution, or corrected for that.
    """
    rows = [row for t in range(config.em.iterations + 1) if (row := _row(run, t)) is not None]
    return {
        "run": run.path.name,
        "iterations": [row for row in rows if row["iteration"] > 0],
        "best_iteration": best_iteration(run, config.em),
        "select_by": config.em.select_by,
        "weighting": config.weighting.method,
        "proposal": _proposal(config),
        "seed": config.seed,
        "warm_up": next((row for row in rows if row["iteration"] == 0), None),
        "test": run.test_results(),
    }


def best_iteration(run: RunFiles, em: EmConfig) -> int:
    """The iteration with the highest dev score; the earliest of equals; 0 if there are none."""
    scores = {t: _dev_score(run, t, em) for t in range(em.iterations + 1)}
    known = {t: score for t, score in scores.items() if score is not None}
    return max(known, key=lambda t: (known[t], -t), default=0)


def should_stop(run: RunFiles, t: int, em: EmConfig) -> bool:
    """True if the last `em.patience` iterations up to t brought no better dev score."""
    return em.patience is not None and t - best_iteration(run, em) >= em.patience


def scalars(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries, under dotted names."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _dev_score(run: RunFiles, t: int, em: EmConfig) -> float | None:
    result = run.finished(t, "evaluation")
    return None if result is None else result["scores"][em.select_by]


def _row(run: RunFiles, t: int) -> Json | None:
    """One iteration's figures, as soon as its first phase is finished."""
    phases = {name: result for name in PHASES if (result := run.finished(t, name)) is not None}
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
        "push": evaluation.get("push"),
        "dev": evaluation.get("scores"),
    }


def _proposal(config: Config) -> str:
    rollout = config.rollout
    if rollout.temperature == 1.0 and rollout.top_p == 1.0 and rollout.top_k == 0:
        return "the model itself"
    settings = f"temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, top_k {rollout.top_k}"
    how = "corrected by the clipped ratio p/q" if config.weighting.correct_proposal else "not corrected"
    return f"{settings}; {how}"
