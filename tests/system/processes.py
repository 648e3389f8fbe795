"""Whole commands in processes of their own, to the end or until they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 900
CLI = ("-m", "pipeline.cli")


def of_its_own() -> dict[str, str]:
    """The environment of a command that starts a cluster for itself, also where another one runs on this machine."""
    return {**os.environ, "RAY_ADDRESS": "local"}


def command(name: str, run: Path, settings: list[str], program: Sequence[str]) -> list[str]:
    return [sys.executable, *program, name, "--run", str(run), *settings]


def finish(run: Path, settings: list[str], program: Sequence[str] = CLI, name: str = "train") -> None:
    """Run the command to its end."""
    result = subprocess.run(
        command(name, run, settings, program),
        env=of_its_own(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def kill_when(
    run: Path, settings: list[str], reached: Callable[[], bool], program: Sequence[str] = CLI
) -> None:
    """Start the command and SIGKILL the driver, without warning, as soon as `reached` says so."""
    process = subprocess.Popen(
        command("train", run, settings, program),
        env=of_its_own(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _await(process, reached)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


def ended_by(
    run: Path,
    settings: list[str],
    reached: Callable[[], bool],
    disturb: Callable[[subprocess.Popen[str]], None],
) -> tuple[int, list[str]]:
    """Start the command and disturb it as soon as `reached` says so; its exit code and what it said in lines.

    Fails if a process that it had started outlives it.
    """
    with subprocess.Popen(
        command("train", run, settings, CLI),
        env=of_its_own(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _await(process, reached)
        started = psutil.Process(process.pid).children(recursive=True)
        disturb(process)
        _, said = process.communicate(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert [" ".join(other.cmdline()) for other in alive] == []
    return process.returncode, said.splitlines()


def _await(process: subprocess.Popen[Any], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "did not get there in time"
        time.sleep(0.05)
