"""One run of an experiment, as a process of its own: what it held is free behind it, and its end ends nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.progress import PROGRESS_FILE
from pipeline.core.run import read_json

POLL_S = 1.0
GRACE_S = 120.0
"""Longest wait for a run that was told to end, in seconds."""


def run_in_process(run: PlannedRun, tell: Callable[[str], None]) -> str | None:
    """`exsearch train` of a run; what it prints goes to a log beside its directory.

    Args:
        tell: gets words on how it stands, about once a second.

    Returns:
        None, or why it failed.
    """
    log = run.path.with_name(f"{run.path.name}.log")
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "train",
        "--config",
        str(run.file),
        "--run",
        str(run.path),
    ]
    with log.open("ab") as output:
        begin = output.tell()
        # A session of its own: Ctrl-C in the terminal reaches the run through us alone, and once.
        child = subprocess.Popen(
            [*command, *run.overrides],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(child, run.path, tell)
        except BaseException:
            _end(child)
            raise
    return None if code == 0 else f"exit code {code}, {_last_words(log, begin)}; see {log}"


def _wait(child: subprocess.Popen[bytes], run: Path, tell: Callable[[str], None]) -> int:
    while True:
        try:
            return child.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            tell(how_it_stands(run))


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def how_it_stands(run: Path) -> str:
    """The phase of a run that goes on, in words."""
    try:
        phase = (read_json(run / PROGRESS_FILE) or {}).get("phase")
    except UserError:  # it is for show
        phase = None
    if not phase:
        return "starting"
    name, total = phase["name"], phase["total"]
    return f"{name}, {phase['done']:,.0f} of {total:,.0f} {phase['unit']}" if total else str(name)


def _last_words(log: Path, begin: int) -> str:
    """Of a command that failed: the line with its error, else its last one. Its log begins there, in bytes; what stands
    before is of earlier ones."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["without a word"])[-1]
