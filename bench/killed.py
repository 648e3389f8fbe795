"""Encoding and building under a memory bound, undisturbed and killed on the way: same bytes, and how much memory.

    python -m bench.killed --directory DIR [--passages 50000] [--memory 2GiB] [--kills 3]

The corpus is the head of a generated `medium` world. `exsearch index build` runs to its end once; a second time it is
killed with SIGKILL, and started again, `--kills` times, at equal shares of the first run's time. Memory is the resident
memory of all its processes together, read every 50 ms (pages that they share count once for each). Prints Markdown, and
ends with status 1 if the two indexes differ in a byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.core.data.world.writer import write_world
from retriever_service.console import size_in_bytes

SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """One process tree, from its start to its end."""

    seconds: float
    peak_bytes: int
    status: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="where to build; must not exist")
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--memory", default="2GiB", help="bound of every run")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--factory", default="Flat")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    corpus = _corpus(arguments.directory, arguments.passages)
    command = [sys.executable, "-m", "retriever_service", "build", "--corpus", str(corpus)]
    command += ["--factory", arguments.factory, "--memory", arguments.memory, "--out"]
    bound = size_in_bytes(arguments.memory)

    print("| run | ended | seconds | peak memory (MiB) | of the bound |\n|---|---|---:|---:|---:|")
    quiet, disturbed = arguments.directory / "quiet", arguments.directory / "disturbed"
    whole = run([*command, str(quiet)])
    _print_run("undisturbed", whole, bound)
    if whole.status:
        return 1
    share = whole.seconds / (arguments.kills + 1)
    for number in range(arguments.kills):
        # Each goes on where the last one was killed, and so far again.
        _print_run(f"killed {number + 1}", run([*command, str(disturbed)], kill_after_s=share), bound)
    _print_run("goes on to its end", run([*command, str(disturbed)]), bound)
    same = digest(quiet) == digest(disturbed)
    print(f"\n{len(digest(quiet))} files, {'identical byte for byte' if same else 'NOT identical'}")
    return int(not same)


def run(command: list[str], kill_after_s: float | None = None) -> Run:
    """Run `command`, kill it after so long, and watch its memory."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            if kill_after_s is not None and time.monotonic() - started > kill_after_s:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(SAMPLE_S)
    return Run(time.monotonic() - started, peak, process.returncode)


def digest(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _resident(session: int) -> int:
    """Bytes of all processes of a session."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may hold anything: state, parent, group, session, ...; see proc(5).
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            pages += int(fields[21])
    return pages * resource.getpagesize()


def _corpus(directory: Path, passages: int) -> Path:
    write_world(directory / "world", seed=0, size="medium")
    corpus = directory / "corpus.jsonl"
    with open(directory / "world" / "corpus.jsonl", encoding="utf-8") as lines:
        corpus.write_text("".join(islice(lines, passages)), encoding="utf-8")
    return corpus


def _print_run(name: str, measured: Run, bound: int) -> None:
    ended = "killed" if measured.status == -signal.SIGKILL else f"status {measured.status}"
    print(
        f"| {name} | {ended} | {measured.seconds:.0f} | {measured.peak_bytes / 2**20:,.0f} | "
        f"{measured.peak_bytes / bound:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
