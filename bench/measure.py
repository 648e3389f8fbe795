"""Paired measurements: ours and the limit in turn, so that a drift of the machine's speed hits both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

RUNS = 5


HEADER = "what; ours; compared with; limit; ratio (median); min; max; goal"
"""Of a table of ratios."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Rates of both sides, one per run, in `unit` per second; the goal is for ours / limit."""

    what: str
    limit_name: str
    unit: str
    ours: list[float]
    limit: list[float]
    goal: float

    def cells(self) -> list[str]:
        ratios = [a / b for a, b in zip(self.ours, self.limit, strict=True)]
        return [
            self.what,
            f"{statistics.median(self.ours):,.0f} {self.unit}/s",
            self.limit_name,
            f"{statistics.median(self.limit):,.0f} {self.unit}/s",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f">= {self.goal:g}",
        ]


def print_table(header: str, rows: Iterable[Sequence[str]]) -> None:
    """As Markdown; the cells of `header` are separated by "; "."""
    cells = header.split("; ")
    for row in (cells, ["---"] * len(cells), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def in_turn(ours: Callable[[], float], limit: Callable[[], float]) -> tuple[list[float], list[float]]:
    """`RUNS` rates of each, after one of each that does not count."""
    ours(), limit()
    pairs = [(ours(), limit()) for _ in range(RUNS)]
    return [a for a, _ in pairs], [b for _, b in pairs]
