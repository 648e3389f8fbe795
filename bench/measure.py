"""Paired measurements: ours and the limit in turn, so that a drift of the machine's speed hits both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

RUNS = 5


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


def in_turn(ours: Callable[[], float], limit: Callable[[], float]) -> tuple[list[float], list[float]]:
    """`RUNS` rates of each, after one of each that does not count."""
    ours(), limit()
    pairs = [(ours(), limit()) for _ in range(RUNS)]
    return [a for a, _ in pairs], [b for _, b in pairs]
