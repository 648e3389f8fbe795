"""How time and memory of an EM iteration grow with the number of questions, and with the number of passages.

    python -m bench.growth --directory DIR questions [50 200 800] [--plot SVG]
    python -m bench.growth --directory DIR passages [2000 100000 2000000] [--plot SVG]

One iteration of the demo for each number, one after the other, each with engines and learner of its own: over the
demo's 2,000 passages, or with 100 questions. The indexes are those of `bench.corpora`, and built before (that module
as a command does it by itself). What was measured is kept in DIR and not measured again, so that a long table can be
made in parts. Memory is the anonymous memory of each kind of process (`bench.memory`), its processes added, its
highest of five readings a second: the driver's must not grow. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from bench.corpora import ASKED_ABOUT, index_of
from bench.measure import print_table
from bench.memory import by_kind
from bench.plots import Point, draw_growth
from pipeline.core.run import write_json

SIZES = {"questions": (50, 200, 800), "passages": (2_000, 100_000, 2_000_000)}
FIXED = {"questions": 100, "passages": ASKED_ABOUT}
"""Of what does not grow."""
EVERY_S = 0.2
PHASES = {"E-step": "expectation", "M-step": "maximisation"}
KINDS = {
    "driver": re.compile(r"pipeline\.cli"),
    "engines": re.compile(r"VLLM::"),
    "rollout workers": re.compile(r"ray::RolloutWorker"),
    "weighting": re.compile(r"ray::Weighting"),
    "learner": re.compile(r"ray::LearnerRank"),
    "retriever": re.compile(r"ray::RetrieverActor"),
}
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="of indexes, runs and what was measured"
    )
    parser.add_argument("axis", choices=SIZES, help="what grows")
    parser.add_argument("sizes", type=int, nargs="*")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw it too")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    sizes = sorted(arguments.sizes or SIZES[arguments.axis])
    points = [point_of(arguments.directory, arguments.axis, size) for size in sizes]
    header = [
        arguments.axis,
        *(f"{phase}, s" for phase in PHASES),
        "s per question, both",
        "generated tokens",
    ]
    print_table("; ".join([*header, *(f"{kind}, MiB" for kind in KINDS)]), map(_cells, points))
    if arguments.plot is not None:
        draw_growth(points, arguments.axis, arguments.plot)
    return 0


def point_of(directory: Path, axis: str, size: int) -> Point:
    """Measured, unless it was before."""
    kept = directory / f"{axis}-{size}.json"
    if not kept.exists():
        write_json(
            kept, asdict(_measured(directory, directory / f"{axis}-{size}", FIXED | {axis: size}, size))
        )
    return Point(**json.loads(kept.read_text()))


def _measured(directory: Path, run: Path, sizes: dict[str, int], size: int) -> Point:
    settings = [
        "em.iterations=1",
        "evaluation.baselines=false",
        "data.dev_limit=20",
        "data.test_limit=20",
        f"data.train_limit={sizes['questions']}",
        f"retriever.index={index_of(directory, sizes['passages'])}",
    ]
    peaks = _watched(["demo", "--run", str(run), *settings])
    (row,) = json.loads((run / "report.json").read_text())["iterations"]
    return Point(
        size=size,
        questions=sizes["questions"],
        tokens=row["train"]["generated_tokens"],
        seconds={name: row["phase_seconds"][phase] for name, phase in PHASES.items()},
        mib={kind: peaks[kind] / MIB for kind in KINDS},
    )


def _cells(point: Point) -> list[str]:
    return [
        f"{point.size:,}",
        *(f"{seconds:.1f}" for seconds in point.seconds.values()),
        f"{sum(point.seconds.values()) / point.questions:.3f}",
        f"{point.tokens:,}",
        *(f"{mib:,.0f}" for mib in point.mib.values()),
    ]


def _watched(command: list[str]) -> Counter[str]:
    """Highest anonymous memory by kind of process while `exsearch COMMAND` runs.

    Raises:
        SystemExit: it failed, and has said why.
    """
    peaks = Counter[str]()
    with subprocess.Popen([sys.executable, "-m", "pipeline.cli", *command]) as process:
        while process.poll() is None:
            peaks |= by_kind(process.pid, KINDS)
            time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peaks


if __name__ == "__main__":
    sys.exit(main())
