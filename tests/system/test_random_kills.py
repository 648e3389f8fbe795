"""The demo, killed a hundred times at random moments with all its processes: it ends as if nothing had happened.

With `-rP` pytest shows what was done again after each kill (docs/reliability.md). It takes about two hours;
EXSEARCH_KILLS names another number of kills.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
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
    """Where a process that works on the run stands in a phase, of which `begun_at` was done before it."""

    phase: str
    done: float
    begun_at: float

    @classmethod
    def of(cls, run: Path) -> Standing | None:
        phase = (read_json(run / "progress.json") or {}).get("phase")
        if not phase or phase["total"] is None:
            return None
        return cls(phase["name"], phase["done"], phase["begun_at"])


def start(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "demo", "--run", str(run), *SETTINGS],
        env=of_its_own(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def first_work_s(run: Path) -> float:
    """Run the demo to its end; how long it took until it had something to count."""
    began, process, first = time.monotonic(), start(run), None
    while process.poll() is None:
        if first is None and (run / "iterations").exists():
            first = time.monotonic() - began
        time.sleep(0.1)
    assert process.returncode == 0 and first is not None
    return first


def test_a_demo_that_is_killed_a_hundred_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    longest = 2.0 * first_work_s(undisturbed)
    moments, kills = random.Random(0), 0
    before: Standing | None = None
    while True:
        process, until = start(killed), time.monotonic() + moments.uniform(0, longest)
        seen = False
        while process.poll() is None and (kills >= KILLS or time.monotonic() < until):
            now = Standing.of(killed)
            if before is not None and now is not None and now.phase == before.phase and not seen:
                seen = True
                print(f"kill {kills}: {before.phase}: {max(0.0, before.done - now.begun_at):g} again")
            time.sleep(0.1)
        if process.poll() is not None:
            break
        kill(tree(psutil.Process(process.pid)))
        process.wait(60)
        kills += 1
        before = Standing.of(killed) or before
    assert process.returncode == 0
    print(f"{kills} kills")
    assert results(killed) == results(undisturbed)


def results(run: Path) -> Any:
    """What the agents did and how they scored."""
    report = json.loads((run / "report.json").read_text())
    sampled = [row["train"] for row in report["iterations"]]
    return [
        [(row["generated_tokens"], row["stop_reasons"]) for row in sampled],
        [(row["dev"]["em"], row["dev"]["f1"]) for row in report["iterations"]],
        {name: (scores["em"], scores["f1"]) for name, scores in report["test"].items()},
    ]
