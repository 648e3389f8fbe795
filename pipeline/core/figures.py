"""Figures as files: the same figures give the same bytes (no date, no random ids, text as text). Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
