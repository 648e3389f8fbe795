"""Whole runs of `exsearch` for comparisons: made once, kept, and summed up over seeds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finished(run: Path, command: Sequence[str]) -> dict[str, Any]:
    """The report of a run that is made, or gone on with, by `exsearch COMMAND`, unless it is finished.

    The index of a finished run beside it is used again: runs that are compared search the same one.

    Raises:
        SystemExit: the command failed, and has said why; the exit code is its own.
    """
    path = run / "report.json"
    if not (path.exists() and "best" in json.loads(path.read_text())["test"]):
        index = next(run.parent.glob("*/index"), None)
        shared = [f"retriever.index={index}"] if index and index.parent != run else []
        code = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *command, *shared], check=False
        ).returncode
        if code != 0:
            raise SystemExit(code)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def spread(values: Sequence[float]) -> str:
    """`mean (standard deviation)` of one figure over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ({deviation:.1f})"
