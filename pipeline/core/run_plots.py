"""Figures of runs for a paper, from their reports.

The same reports give the same bytes (`core.figures`); everything is told by shape and place, not by colour. Intervals
are those of the reports: bootstrap over questions for scores, 1.96 standard errors for the bound.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.figures import Row, draw_curve, draw_rows, figure_file
from pipeline.core.report import in_order
from pipeline.core.run import Json
from pipeline.core.scoring.answers import METRICS
from pipeline.core.scoring.comparisons import common_scores, score_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TESTS = ("base", "no_search", "one_search", "cold_start", "start", "best")
"""Models of a test in their order, of all recipes."""
PHASES = {"expectation": "", "maximisation": "///", "evaluation": "..."}
"""And how each is hatched."""
GREYS = ("0.85", "0.7", "1.0")
INCH_PER_ROW = 0.36
BAR = 0.27
"""Height of one of three bars of an iteration."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A run's report, and the name under which it is shown.

    Attributes:
        behind: how many iterations before its own the model was made that an E-step samples; 2 with `asynchronous`.
        settings: the same of runs that differ in their seed alone; empty where that is not known.
        best: of the test of the best iteration, by metric the score in [0, 1] of each question; empty where these are
            not recorded.
    """

    name: str
    report: Json
    behind: int = 1
    settings: str = ""
    best: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def rows(self) -> list[Json]:
        """The iterations, with what the run began with as iteration 0."""
        start = self.report.get("cold_start") or self.report.get("start")
        return [*([] if start is None else [{"iteration": 0, **start}]), *self.report["iterations"]]


@dataclass(frozen=True, slots=True)
class Value:
    """At a place of a curve, with an interval where there is one."""

    at: float
    mean: float
    low: float | None = None
    high: float | None = None


def draw(name: str, runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """Write one of `PLOTS`; False where no run has anything that belongs in it."""
    return PLOTS[name](runs, metric, path)


# ---------------------------------------------------------------- scores


def _dev(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    curves = {run.name: list(_scored(run.rows(), metric)) for run in runs}
    return _panels(path, [(f"dev {METRICS[metric]}, percent", curves)])


def _hops(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """A panel per run, a curve per number of hops."""
    panels = []
    for run in runs:
        groups = {hops for row in run.rows() for hops in _dev_of(row).get("by_hops", {})}
        curves = {
            f"{hops} {'hop' if hops == '1' else 'hops'}": list(_scored(run.rows(), metric, hops=hops))
            for hops in sorted(groups)
        }
        title = f"dev {METRICS[metric]}, percent" + (f": {run.name}" if len(runs) > 1 else "")
        panels.append((title, curves))
    return _panels(path, panels)


def _searches(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    def curves(key: str) -> dict[str, list[Value]]:
        return {run.name: list(_values((r, _dev_of(r).get(key)) for r in run.rows())) for run in runs}

    return _panels(
        path,
        [
            ("searches of a dev question", curves("searches")),
            ("gold passages found, percent", curves("gold_recall")),
        ],
    )


def _test(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """A row per run and model, the first one on top."""
    rows = [
        Row(
            f"{run.name}: {_words(name)}" if len(runs) > 1 else _words(name),
            scores[metric],
            scores.get(f"{metric}_interval"),
        )
        for run in runs
        for name, scores in _tests(run)
        if scores.get(metric) is not None
    ]
    return _rows(path, rows, f"test {METRICS[metric]}, percent; line = 95 % interval")


def _ablation(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """A row per set of runs that differ in their seed alone: the test score of their best iterations, the mean over
    seeds and over the questions that all of them answered."""
    groups: dict[str, list[Reported]] = {}
    for run in runs:
        groups.setdefault(run.settings or run.name, []).append(run)
    rows = [row for group in groups.values() if (row := _mean_of(group, metric)) is not None]
    label = f"test {METRICS[metric]} of the best iteration, percent; line = 95 % interval"
    return _rows(path, rows, label + ("; hollow = a seed" if any(row.parts for row in rows) else ""))


def _mean_of(runs: Sequence[Reported], metric: str) -> Row | None:
    """None where none of them is tested, or they share no question."""
    tested = [run for run in runs if metric in run.best]
    table = common_scores([run.best[metric] for run in tested])[1] if tested else np.empty((0, 0))
    if not table.size:
        return None
    found, seeds = score_estimate(table), 100 * table.mean(axis=1)
    # What their names have in common is a folder, "weighted" of "weighted/seed-1".
    common = os.path.commonpath([run.name for run in tested]) or ", ".join(run.name for run in tested)
    name = common if len(tested) == 1 else f"{common} ({len(tested)} seeds)"
    parts = seeds.tolist() if len(tested) > 1 else ()
    return Row(name, 100 * found.mean, (100 * found.low, 100 * found.high), parts)


def _rows(path: Path, rows: Sequence[Row], label: str) -> bool:
    if not rows:
        return False
    with figure_file(path, 6.0, 0.9 + INCH_PER_ROW * len(rows)) as figure:
        draw_rows(figure.subplots(), rows, label)
    return True


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tests(run: Reported) -> Iterator[tuple[str, Json]]:
    tests = run.report.get("test", {})
    return ((name, tests[name]) for name in in_order(tests, TESTS))


# ---------------------------------------------------------------- E-step, time


def _e_step(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """Of the model that was sampled."""

    def curves(key: str, stderr: str | None = None) -> dict[str, list[Value]]:
        found = {}
        for run in runs:
            sampled = [
                (max(0, row["iteration"] - run.behind), row.get("train") or row.get("sample") or {})
                for row in run.rows()
            ]
            found[run.name] = [
                Value(t, s[key], *_spread(s[key], s.get(stderr)))
                for t, s in sampled
                if _is_number(s.get(key))
            ]
        return found

    return _panels(
        path,
        [
            ("bound on log p(y | x)", curves("likelihood_bound", "likelihood_bound_stderr")),
            ("effective sample size", curves("effective_sample_size")),
            ("questions without a right trajectory, percent", curves("all_failed_share")),
        ],
    )


def _time(runs: Sequence[Reported], metric: str, path: Path) -> bool:
    """A bar per phase of an iteration. They may overlap, so that their sum says nothing."""
    rows = [
        (f"{run.name}: {row['iteration']}" if len(runs) > 1 else str(row["iteration"]), row["phase_seconds"])
        for run in runs
        for row in run.rows()
        if row.get("phase_seconds")
    ]
    if not rows:
        return False
    places = range(len(rows), 0, -1)
    with figure_file(path, 6.0, 1.2 + 2 * INCH_PER_ROW * len(rows)) as figure:
        axes = figure.subplots()
        for number, ((phase, hatch), grey) in enumerate(zip(PHASES.items(), GREYS, strict=True)):
            minutes = [seconds.get(phase, 0.0) / 60 for _, seconds in rows]
            at = [place + BAR * (1 - number) for place in places]
            axes.barh(at, minutes, BAR, color=grey, hatch=hatch, edgecolor="black", label=phase)
        axes.set_yticks(list(places), [name for name, _ in rows])
        axes.set_ylabel("iteration")
        axes.set_xlabel("minutes; phases may overlap")
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return True


PLOTS: dict[str, Callable[[Sequence[Reported], str, Path], bool]] = {
    "dev": _dev,
    "test": _test,
    "ablation": _ablation,
    "hops": _hops,
    "searches": _searches,
    "e-step": _e_step,
    "time": _time,
}


# ---------------------------------------------------------------- curves


def _panels(path: Path, panels: Sequence[tuple[str, dict[str, list[Value]]]]) -> bool:
    """Curves by iteration, beside each other, those without a value left out; one legend where there are several."""
    shown = [
        (title, {name: values for name, values in curves.items() if values})
        for title, curves in panels
        if any(curves.values())
    ]
    if not shown:
        return False
    with figure_file(path, 4.2 * len(shown), 3.4) as figure:
        row = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (title, curves) in zip(row, shown, strict=True):
            _curves(axes, title, curves)
        names = [list(curves) for _, curves in shown]
        for axes, here in zip(row, names, strict=True):
            if len(here) > 1 and (axes is row[0] or here != names[0]):
                axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)
    return True


def _curves(axes: Axes, title: str, curves: dict[str, list[Value]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, values) in enumerate(curves.items()):
        draw_curve(axes, number, name, [value.at for value in values], [value.mean for value in values])
        for value in values:
            if value.low is not None and value.high is not None:
                axes.plot([value.at] * 2, [value.low, value.high], color="0.5", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_title(title, fontsize=9)


def _dev_of(row: Json) -> Json:
    """ExSearch's report and that of other recipes name them differently."""
    found = row.get("dev") or (row.get("evaluation") or {}).get("scores") or row.get("evaluation") or {}
    return dict(found)


def _scored(rows: Sequence[Json], metric: str, *, hops: str | None = None) -> Iterator[Value]:
    for row in rows:
        scores = _dev_of(row) if hops is None else _dev_of(row).get("by_hops", {}).get(hops, {})
        if _is_number(scores.get(metric)):
            low, high = scores.get(f"{metric}_interval") or (None, None)
            yield Value(row["iteration"], scores[metric], low, high)


def _values(found: Iterator[tuple[Json, Any]]) -> Iterator[Value]:
    return (Value(row["iteration"], value) for row, value in found if _is_number(value))


def _spread(mean: float, stderr: Any) -> tuple[float, float] | tuple[None, None]:
    return (mean - 1.96 * stderr, mean + 1.96 * stderr) if _is_number(stderr) else (None, None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
