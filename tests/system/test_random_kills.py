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
SHARE_IN_START = 0.3
"""Of the kills: before the process works again, so long as that takes no longer than in the undisturbed run."""
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


def watched(process: subprocess.Popen[bytes], run: Path) -> Iterator[Standing | None]:
    """Where the process stands, again and again until it ends; None as long as it counts nothing."""
    while process.poll() is None:
        yield Standing.of(process, run)
        time.sleep(0.1)


@dataclass(frozen=True)
class Undisturbed:
    """The run to compare with: the names of its phases in order, and how long until it first sampled."""

    phases: list[str]
    start_s: float

    @classmethod
    def run(cls, at: Path) -> Undisturbed:
        began, process, start_s = time.monotonic(), start(at), math.nan
        phases: dict[str, None] = {}
        for standing in watched(process, at):
            if standing is None:
                continue
            if math.isnan(start_s) and standing.unit == "questions":
                start_s = time.monotonic() - began
            phases.setdefault(standing.phase)
        assert process.returncode == 0
        return cls(list(phases), start_s)

    def longest_s(self, phase: str, kills: int) -> float:
        """The longest that a process may work in `phase`: so long that all kills fall before the end of the run.

        One that is ahead of the kills is killed sooner, and in the last phase at once.
        """
        if phase == self.phases[-1]:
            return 1.0
        position = self.phases.index(phase) / len(self.phases) if phase in self.phases else 0.0
        return self.start_s * (0.2 if position > kills / KILLS else 1.5)


def test_a_demo_that_is_killed_a_hundred_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    at, run = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed = Undisturbed.run(at)
    moments, kills = random.Random(0), 0
    struck: Standing | None = None  # where the run was at the last kill that has not been made good
    again: dict[str, list[float]] = {}
    while True:
        process, last = start(run), None
        in_start, share = moments.random() < SHARE_IN_START, moments.random()
        until = time.monotonic() + share * undisturbed.start_s if in_start else math.inf
        for standing in watched(process, run):
            if standing is not None:
                if last is None or standing.phase != last.phase:
                    longest = undisturbed.longest_s(standing.phase, kills)
                    until = min(until, time.monotonic() + share * longest)
                if struck is not None and standing.phase == struck.phase:
                    undone = max(0.0, struck.done - standing.begun_at)
                    again.setdefault(struck.unit, []).append(undone)
                    print(f"{kills} kills: {struck.phase}: {undone:g} {struck.unit} again")
                struck = None
                last = standing
            if kills < KILLS and time.monotonic() > until:
                break
        if process.poll() is not None:
            break
        kill_with_its_memory(tree(psutil.Process(process.pid)))
        process.wait(60)
        kills += 1
        struck = last or struck
    for unit, counts in again.items():
        print(
            f"{len(counts)} kills: {statistics.median(counts):g} {unit} again (median), at most {max(counts):g}"
        )
    assert process.returncode == 0
    assert results(run) == results(at)
    assert kills == KILLS


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
