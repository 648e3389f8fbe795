"""Figures as SVG: the same figures give the same bytes (no date, no random ids, text as text). Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
            f"plots need matplotlib, which is not installed: pip install matplotlib, or {otherwise}"
        )


@contextmanager
def svg_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """In inches; written when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "exsearch", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height))
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
