"""Figures as files: the same figures give the same bytes (no date, no random ids, text as text). Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_NO_DATE: dict[str, dict[str, None]] = {
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".png": {"Software": None},
}
"""The forms that a figure may have, by the ends of their names, and what is kept out of each."""
LINES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"))
"""Marker and style of the curves of a panel, in their order: told apart without colour."""


def require_matplotlib(otherwise: str) -> None:
    """
    Args:
        otherwise: how to do without plots.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            f"plots need matplotlib, which is not installed: pip install 'exsearch[plots]', or {otherwise}"
        )


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """In inches; written when the block ends, in the form that the end of its name says (`OF_NO_DATE`)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "exsearch", "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure = Figure(figsize=(width, height))
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata=OF_NO_DATE[path.suffix.lower()], dpi=200)


@dataclass(frozen=True, slots=True)
class Row:
    """A mean with its interval, by name; `parts`: what it is the mean of, where that is shown too."""

    name: str
    mean: float
    interval: Sequence[float] | None
    parts: Sequence[float] = ()


def draw_rows(axes: Axes, rows: Sequence[Row], label: str, *, reference: Row | None = None) -> None:
    """A point and a line for each, the first on top; hollow points are the parts. At the mean of `reference`, one of
    them, is a grey line."""
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        if row.interval:
            axes.plot(row.interval, [place, place], color="black", linewidth=1.0)
        for part in row.parts:
            axes.plot(
                part, place, marker="o", markersize=4, markerfacecolor="white", color="0.4", linestyle="none"
            )
        axes.plot(row.mean, place, marker="o", color="black", linestyle="none")
        if row is reference:
            axes.axvline(row.mean, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yticks(list(places), [row.name for row in rows])
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_xlabel(label)


def draw_curve(axes: Axes, number: int, name: str, places: Sequence[float], values: Sequence[float]) -> None:
    """The number-th curve of a panel."""
    marker, style = LINES[number % len(LINES)]
    axes.plot(
        places,
        values,
        color="black",
        marker=marker,
        linestyle=style,
        markerfacecolor="black" if number < len(LINES) else "white",
        label=name,
    )
