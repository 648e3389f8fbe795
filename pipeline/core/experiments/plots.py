"""The plots of an experiment, as SVG.

The same results give the same bytes (`core.figures`), and everything is told by shape and place, not by colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from pipeline.core.experiments.results import ArmResult, Results
from pipeline.core.experiments.spec import PlotName
from pipeline.core.experiments.tables import CurvePoint, curve
from pipeline.core.figures import Row, draw_curve, draw_rows, figure_file
from pipeline.core.scoring.answers import METRICS
from pipeline.core.scoring.comparisons import Estimate, score_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH_PER_ROW = 0.42
LABEL_COLUMNS = 40
"""Characters of an arm's name before it is broken."""


def draw(name: PlotName, results: Results, path: Path) -> bool:
    """Write one plot; False where nothing that is finished belongs in it."""
    return DRAWERS[name](results, path)


def _draw_test(results: Results, path: Path) -> bool:
    """A line per arm: mean over seeds and questions, and its interval; the grey line is the baseline's mean."""
    found = _estimates(results.arms)
    if not found:
        return False
    rows = {
        arm.arm.name: Row(
            fill(arm.arm.name, LABEL_COLUMNS), 100 * estimate.mean, (100 * estimate.low, 100 * estimate.high)
        )
        for arm, estimate in found
    }
    baseline = None if results.baseline is None else rows.get(results.baseline.arm.name)
    with figure_file(path, 8.0, 1.0 + INCH_PER_ROW * len(found)) as figure:
        label = f"test {_metric(results)}, percent; line = 95 % interval"
        draw_rows(figure.subplots(), list(rows.values()), label, reference=baseline)
    return True


def _draw_parameter(results: Results, path: Path) -> bool:
    """Test score against the value that varies; where values are not all numbers, at equal distances."""
    found = _estimates([arm for arm in results.arms if arm.arm.name in _varied(results)])
    if not found:
        return False
    (key,) = results.experiment.spec.vary
    values = [arm.arm.values[0] for arm, _ in found]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = values if are_numbers else list(range(len(values)))
    with figure_file(path, 6.0, 4.0) as figure:
        axes = figure.subplots()
        means = [100 * estimate.mean for _, estimate in found]
        axes.vlines(
            places,
            [100 * estimate.low for _, estimate in found],
            [100 * estimate.high for _, estimate in found],
            color="black",
            linewidth=1.0,
        )
        axes.plot(places, means, color="black", marker="o")
        axes.set_xticks(places, [str(value) for value in values])
        axes.set_xlabel(key)
        axes.set_ylabel(f"test {_metric(results)}, percent")
    return True


def _draw_iterations(results: Results, path: Path) -> bool:
    """Dev score against the iteration, a curve per arm."""
    return _draw_curves(results, path, "iteration", lambda point: point.iteration, whole=True)


def _draw_tokens(results: Results, path: Path) -> bool:
    """Dev score against the tokens that were generated for training, a curve per arm."""
    return _draw_curves(results, path, "tokens generated for training", lambda point: point.tokens)


def _draw_curves(
    results: Results, path: Path, axis: str, place: Callable[[CurvePoint], float], *, whole: bool = False
) -> bool:
    from matplotlib.ticker import MaxNLocator

    curves = {found.arm.name: points for found in results.arms if (points := curve(found))}
    if not curves:
        return False
    with figure_file(path, 7.0, 4.4) as figure:
        axes: Axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            draw_curve(
                axes, number, name, [place(point) for point in points], [100 * point.dev for point in points]
            )
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(axis)
        axes.set_ylabel(f"dev {_metric(results)}, percent")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return True


DRAWERS: dict[PlotName, Callable[[Results, Path], bool]] = {
    "test": _draw_test,
    "parameter": _draw_parameter,
    "iterations": _draw_iterations,
    "tokens": _draw_tokens,
}


def _estimates(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, Estimate]]:
    """Of the arms whose runs share test questions."""
    tables = [(found, found.tests()[1]) for found in arms]
    return [(found, score_estimate(table)) for found, table in tables if table.size]


def _varied(results: Results) -> set[str]:
    return {arm.name for arm in results.experiment.arms if arm.values}


def _metric(results: Results) -> str:
    return METRICS[results.experiment.spec.metric]
