"""`exsearch plot`: the figures of a paper from the reports of runs. Only reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.config import section_of
from pipeline.core.config.loading import read_tree
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.figures import OF_NO_DATE, require_matplotlib
from pipeline.core.question_scores import read_scores
from pipeline.core.run import read_json, what_computes
from pipeline.core.run_plots import PLOTS, Reported, draw
from pipeline.core.scoring.answers import METRICS
from pipeline.core.status import distinct_names, run_status

FORMS = tuple(suffix[1:] for suffix in OF_NO_DATE)


def plot(runs: Sequence[Path], out: Path, form: str, metric: str, display: Display) -> None:
    """Write every figure for which the runs have something, and say which of them took the place of an earlier file.

    Raises:
        UserError: a directory holds no run, or none with a report; form or metric are unknown; matplotlib is missing.
    """
    for what, value, known in (("--format", form, FORMS), ("--metric", metric, tuple(METRICS))):
        if value not in known:
            raise UserError(f"{what} {value}: there are {', '.join(known)}")
    require_matplotlib("look at the runs with exsearch view")
    reported = []
    for run, name in zip(runs, distinct_names([run.resolve() for run in runs]), strict=True):
        recipe = run_status(run)["recipe"]  # refuses what is no run
        tree = read_tree(run / "config.yaml")
        if (report := read_json(run / "report.json")) is None:
            raise UserError(f"{run} has no report yet; it is there after the first evaluation")
        section = section_of(recipe)
        settings = json.dumps({**what_computes(tree, section), "seed": None}, sort_keys=True)
        behind = 2 if tree[section].get("asynchronous") else 1
        reported.append(Reported(name, report, behind, settings, _scores(run / "test" / "best.parquet")))
    replaced = []
    for name in PLOTS:
        path = out / f"{name}.{form}"
        was_there = path.exists()
        if not draw(name, reported, metric, path):
            display.line(f"{name}: nothing to draw, for no run has these figures")
            continue
        display.line(str(path))
        if was_there:
            replaced.append(path.name)
    if replaced:
        display.line(f"replaced in {out}: {', '.join(replaced)} (--out names another folder)")


def _scores(path: Path) -> dict[str, dict[str, float]]:
    """By metric the score of each question of an evaluation; none where they are not recorded."""
    if (found := read_scores(path)) is None:
        return {}
    return {metric: dict(zip(found.ids, found.values[metric].tolist(), strict=True)) for metric in METRICS}
