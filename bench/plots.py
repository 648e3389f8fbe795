"""Tables of `python -m bench` and of `python -m bench.growth` as plots.

    python -m bench.plots docs/plots/speed.svg bench.json [MORE.json ...]

draws the ratios that `--json` of the benchmarks wrote, and prints their table: it may have been measured in parts.

Guarantees: the same figures give the same bytes (no date, no random ids, text as text), and everything is told by
shape and place, not by colour. Needs matplotlib, of the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from bench.measure import HEADER, Ratio, print_table
from pipeline.core.figures import LINES, figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH_PER_ROW = 0.42
LABEL_COLUMNS = 64
"""Characters of a row's name before it is broken."""
ROUND = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]
"""Values that an axis may name."""


# ---------------------------------------------------------------- ratios


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the table: where its ratios lie, and its goal."""

    name: str
    lowest: float
    median: float
    highest: float
    goal: float

    @classmethod
    def of(cls, ratio: Ratio) -> Bar:
        ratios = ratio.ratios
        name = f"{ratio.what} : {ratio.limit_name}"
        return cls(name, min(ratios), statistics.median(ratios), max(ratios), ratio.goal)

    @property
    def is_reached(self) -> bool:
        """At the two digits that are shown."""
        return round(self.median, 2) >= round(self.goal, 2)

    @property
    def note(self) -> str:
        return f"{self.median:.2f}, goal {self.goal:.3g}{'' if self.is_reached else ', missed'}"


def draw_ratios(ratios: Sequence[Ratio], path: Path) -> None:
    """A line per ratio: median (hollow where its goal is missed), smallest to largest, and the goal, an upright bar."""
    bars = [Bar.of(ratio) for ratio in ratios]
    places = range(len(bars), 0, -1)
    with figure_file(path, 10.0, 1.2 + INCH_PER_ROW * len(bars)) as figure:
        axes = figure.subplots()
        for place, bar in zip(places, bars, strict=True):
            axes.plot([bar.lowest, bar.highest], [place, place], color="black", linewidth=1.0)
            face = "black" if bar.is_reached else "white"
            axes.plot(bar.median, place, marker="o", color="black", markerfacecolor=face, linestyle="none")
            axes.plot(bar.goal, place, marker="|", color="black", markersize=16, markeredgewidth=2.0)
            axes.annotate(
                bar.note, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        axes.axvline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in ROUND if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(list(places), [fill(bar.name, LABEL_COLUMNS) for bar in bars], fontsize=8)
        axes.set_ylim(0.4, len(bars) + 0.6)
        axes.set_xlabel("ours : limit; dot = median (hollow: goal missed), line = min to max, bar = goal")


# ---------------------------------------------------------------- growth


@dataclass(frozen=True, slots=True)
class Point:
    """What an iteration of one size took: seconds by phase, and MiB by kind of process at its peak."""

    size: int
    questions: int
    tokens: int
    """That were generated in its E-step."""
    seconds: Mapping[str, float]
    mib: Mapping[str, float]


def draw_growth(points: Sequence[Point], axis: str, path: Path) -> None:
    """Time and peak memory against size, both axes logarithmic; the grey line is what grows as the size does."""
    with figure_file(path, 10.0, 4.6) as figure:
        time, memory = figure.subplots(1, 2, gridspec_kw={"wspace": 0.3})
        sizes = [point.size for point in points]
        _curves(time, sizes, [point.seconds for point in points])
        _curves(memory, sizes, [point.mib for point in points])
        time.set_ylabel("seconds")
        memory.set_ylabel("peak memory, MiB")
        for axes in (time, memory):
            axes.set_xlabel(axis)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _curves(axes: Axes, sizes: Sequence[int], figures: Sequence[Mapping[str, float]]) -> None:
    """One for each name in the figures of each size, and what grows in proportion to the size, from the first on."""
    values = [value for found in figures for value in found.values() if value > 0.0]
    low, high = min(values) / 1.5, max(values) * 2.0
    for name, (marker, style) in zip(figures[0], LINES, strict=False):
        curve = [(size, found[name]) for size, found in zip(sizes, figures, strict=True) if found[name] > 0.0]
        axes.plot(*zip(*curve, strict=True), color="black", marker=marker, linestyle=style, label=name)
    line = [max(figures[0].values()) * size / sizes[0] for size in sizes]
    axes.plot(sizes, line, color="0.6", linewidth=3.0, zorder=0, label="linear")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [tick for tick in ROUND if low <= tick <= high]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()


def main() -> int:
    """Print the table of all files, and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("svg", type=Path, help="is written")
    parser.add_argument("files", type=Path, nargs="+", help="of --json of the benchmarks")
    arguments = parser.parse_args()
    ratios = [
        Ratio.from_json(row) for file in arguments.files for row in json.loads(file.read_text())["ratios"]
    ]
    print_table(HEADER, [ratio.cells() for ratio in ratios])
    draw_ratios(ratios, arguments.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
