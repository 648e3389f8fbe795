"""Paired measurements: ours and the limit in turn, so that a drift of the machine's speed hits both."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny-searcher"
RUNS = 5
LIBRARIES = ("torch", "ray", "transformers", "sentence-transformers", "deepspeed", "pyarrow")


class Brevity:
    """Whether all that is asked for is to see that the benchmarks work: `python -m bench --smoke`."""

    is_on = False

    @classmethod
    def runs(cls) -> int:
        """How often each side is measured, behind one time that does not count."""
        return 1 if cls.is_on else RUNS


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

    @property
    def ratios(self) -> list[float]:
        """One per run."""
        return [a / b for a, b in zip(self.ours, self.limit, strict=True)]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Ratio:
        """What `as_json` gave."""
        unit = row["unit"].removesuffix("/s")
        return cls(row["what"], row["compared_with"], unit, row["ours"], row["limit"], row["goal"])

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "compared_with": self.limit_name,
            "unit": f"{self.unit}/s",
            "ours": self.ours,
            "limit": self.limit,
            "ratio": statistics.median(self.ratios),
            "goal": self.goal,
        }

    def cells(self) -> list[str]:
        ratios = self.ratios
        return [
            self.what,
            f"{_number(statistics.median(self.ours))} {self.unit}/s",
            self.limit_name,
            f"{_number(statistics.median(self.limit))} {self.unit}/s",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f">= {self.goal:g}",
        ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3f}"


def print_table(header: str, rows: Iterable[Sequence[str]]) -> None:
    """As Markdown; the cells of `header` are separated by "; "."""
    cells = header.split("; ")
    for row in (cells, ["---"] * len(cells), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def in_its_own_process(name: str) -> list[Ratio]:
    """What a module of `bench` measures. What it leaves behind (threads, memory, process groups) is no other's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, name, Brevity.is_on).result()


def _measured(name: str, is_brief: bool) -> list[Ratio]:
    Brevity.is_on = is_brief
    ratios: list[Ratio] = importlib.import_module(f"bench.{name}").run()
    return ratios


def in_turn(ours: Callable[[], float], limit: Callable[[], float]) -> tuple[list[float], list[float]]:
    """`Brevity.runs()` rates of each, after one of each that does not count."""
    ours(), limit()
    pairs = [(ours(), limit()) for _ in range(Brevity.runs())]
    return [a for a, _ in pairs], [b for _, b in pairs]


def write_ratios(path: Path, ratios: Sequence[Ratio], when: Mapping[str, Any]) -> None:
    """Every run's figures as JSON, with the circumstances at the start of the measurements."""
    found = {"circumstances": when, "smoke": Brevity.is_on, "ratios": [ratio.as_json() for ratio in ratios]}
    path.write_text(json.dumps(found, indent=2) + "\n")


def circumstances() -> dict[str, Any]:
    """When, on what and with what was measured: figures of two machines do not compare."""
    processors = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "processor": processors[0] if processors else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in LIBRARIES},
    }
