"""Tables for the terminal: the form that they share, and those of paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from pipeline.core.scoring.answers import METRICS

METRIC_NAMES = {**METRICS, "gold_recall": "recall"}
_DIFFERENCE = ("difference", "95 %", "p")


def narrow_table(title: str, first: str, columns: Sequence[str]) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=7)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def span(interval: Sequence[float] | None) -> str:
    """An interval of scores, none of which is below 0."""
    return "" if interval is None else f"{interval[0]:.1f}-{interval[1]:.1f}"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def selection_table(selection: Mapping[str, Any]) -> Table:
    """How sure it is which iteration is the best (`comparison.selection`)."""
    metric, questions = METRIC_NAMES[selection["by"]], selection["questions"]
    title = f"which iteration is the best, by {metric} on {questions} dev questions"
    table = narrow_table(title, "iter", (metric, "P(best)", "to the best", "95 %", "p"))
    for row in selection["iterations"]:
        is_selected = row["difference"] is None
        table.add_row(
            f"{row['iteration']}{' *' if is_selected else ''}",
            number(row["score"]),
            number(row["probability_best"], 2),
            *_difference_cells(row),
        )
    return table


def tests_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """Differences of a run's models on the same test questions (`comparison.paired_tests`)."""
    names = (
        *(f"EM {name}" for name in ("+", *_DIFFERENCE[1:])),
        *(f"F1 {name}" for name in ("+", *_DIFFERENCE[1:])),
    )
    table = narrow_table("paired on the same test questions", "models", names)
    for pair in pairs:
        cells = [cell for metric in ("em", "f1") for cell in _difference_cells(pair[metric])]
        table.add_row(escape(f"{pair['b']} - {pair['a']}"), *cells)
    return table


def comparison_table(title: str, first: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per name, each a comparison (`Comparison.in_percent`)."""
    table = narrow_table(title, first, ("n", "A", "B", "B - A", "95 %", "p", "gained", "lost"))
    for name, row in rows.items():
        table.add_row(
            escape(name),
            str(row["n"]),
            number(row["a"]),
            number(row["b"]),
            *_difference_cells(row),
            str(row["gained"]),
            str(row["lost"]),
        )
    return table


def _difference_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if row["difference"] is None:
        return "", "", ""
    interval, p_value = row["interval"], row["p_value"]
    between = "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"
    return f"{row['difference']:+.1f}", between, "" if p_value is None else _p(p_value)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
