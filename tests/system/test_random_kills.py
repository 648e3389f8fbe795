"""The demo, killed a hundred times at random moments with all its processes: it ends as if nothing had happened.

With `-rP` pytest shows what was done again after each kill (docs/reliability.md). It takes about an hour and a half;
EXSEARCH_KILLS names another number of kills.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.core.run import read_json
from tests.system.machines import kill, tree
from tests.system.processes import of_its_own

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(6 * 3600)]

KILLS = int(os.environ.get("EXSEARCH_KILLS", "100"))
QUESTIONS_PER_SHARD, CHECKPOINT_S = 20, 3.0
SETTINGS = (
    f"rollout.questions_per_shard={QUESTIONS_PER_SHARD}",
    f"learner.checkpoint_minutes={CHECKPOINT_S / 60}",
)


@dataclass(frozen=True)
class Standing:
    """Where a process stands in a phase of the run, of which `begun_at` was done before it."""

    phase: str
    unit: str
    done: float
    begun_at: float

    @classmethod
    def of(cls, process: subprocess.Popen[bytes], run: Path) -> Standing | None:
        """None as long as the process counts nothing."""
        progress = read_json(run / "progress.json") or {}
        phase = progress.get("phase")
        if progress.get("pid") != process.pid or not phase or phase["total"] is None:
            return None
        return cls(phase["name"], phase["unit"], phase["done"], phase["begun_at"])


def start(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "demo", "--run", str(run), *SETTINGS],
        env=of_its_own(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def watched(process: subprocess.Popen[bytes], run: Path, until: float = math.inf) -> Iterator[Standing]:
    """Where the process stands, again and again until it ends, or to that moment of `time.monotonic`."""
    while process.poll() is None and time.monotonic() < until:
        if (standing := Standing.of(process, run)) is not None:
            yield standing
        time.sleep(0.1)


@dataclass(frozen=True)
class Undisturbed:
    """The run to compare with: the names of its phases in order, and how long until it first sampled."""

    phases: list[str]
    first_work_s: float

    @classmethod
    def run(cls, at: Path) -> Undisturbed:
        began, process, first = time.monotonic(), start(at), math.nan
        phases: dict[str, None] = {}
        for standing in watched(process, at):
            if math.isnan(first) and standing.unit == "questions":
                first = time.monotonic() - began
            phases.setdefault(standing.phase)
        assert process.returncode == 0
        return cls(list(phases), first)

    def longest_s(self, phase: str, kills: int) -> float:
        """The longest that a process may live: so long that all kills fall before the end, and all over the run."""
        position = self.phases.index(phase) / len(self.phases) if phase in self.phases else 0.0
        return self.first_work_s * (1.25 if position > kills / KILLS else 2.5)


def test_a_demo_that_is_killed_a_hundred_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    at, run = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed = Undisturbed.run(at)
    moments, kills = random.Random(0), 0
    phase = ""  # the newest that was seen
    struck: Standing | None = None  # where the run was at the last kill that has not been made good
    again: dict[str, list[float]] = {}
    while True:
        process, last = start(run), None
        longest = undisturbed.longest_s(phase, kills)
        until = time.monotonic() + moments.uniform(0, longest) if kills < KILLS else math.inf
        for standing in watched(process, run, until):
            last, phase = standing, standing.phase
            if struck is not None:
                if standing.phase == struck.phase:
                    again.setdefault(struck.unit, []).append(max(0.0, struck.done - standing.begun_at))
                    print(f"{kills} kills: {struck.phase}: {again[struck.unit][-1]:g} {struck.unit} again")
                struck = None
        if process.poll() is not None:
            break
        kill_with_its_memory(tree(psutil.Process(process.pid)))
        process.wait(60)
        kills += 1
        struck = last or struck
    assert (process.returncode, kills) == (0, KILLS)
    for unit, counts in again.items():
        print(
            f"{len(counts)} kills: {statistics.median(counts):g} {unit} again (median), at most {max(counts):g}"
        )
    assert results(run) == results(at)


def kill_with_its_memory(processes: list[psutil.Process]) -> None:
    """A segment that vLLM has made and not made nameless yet outlives all those who could have removed it."""
    used: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            used |= {Path(mapping.path) for mapping in process.memory_maps() if "/psm_" in mapping.path}
    kill(processes)
    for path in used:
        path.unlink(missing_ok=True)


def results(run: Path) -> Any:
    """What the agents did and how they scored."""
    report = json.loads((run / "report.json").read_text())
    sampled = [row["train"] for row in report["iterations"]]
    return [
        [(row["generated_tokens"], row["stop_reasons"]) for row in sampled],
        [(row["dev"]["em"], row["dev"]["f1"]) for row in report["iterations"]],
        {name: (scores["em"], scores["f1"]) for name, scores in report["test"].items()},
    ]
