"""Run all benchmarks, or those named: `python -m bench [NAME ...] [--smoke] [--json FILE] [--plot FILE]`.

Each is a ratio of two figures of one run, the second of which is a limit or a peer. With `--smoke` every one runs once,
at a small size: it shows that they work, and its figures say little.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.measure import HEADER, Brevity, Ratio, circumstances, in_its_own_process, print_table, write_ratios
from bench.plots import draw_ratios
from pipeline.core.figures import OF_NO_DATE

BENCHMARKS = (
    "estep",
    "iteration",
    "scoring",
    "learner",
    "large_vocabulary",
    "columns",
    "examples",
    "checkpoint",
    "encode",
    "retrieval",
    "push",
    "start",
    "dispatch",
    "scale",
    "serving",
)
"""Modules of `bench`."""


def main() -> int:
    """Print one row per ratio. Returns the exit code: 2 for an unknown name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}; all without"
    )
    parser.add_argument("--smoke", action="store_true", help="once, at a small size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run's figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table there")
    arguments = parser.parse_args()
    if arguments.plot is not None and arguments.plot.suffix.lower() not in OF_NO_DATE:
        parser.error(f"--plot {arguments.plot}: its name must end in {', '.join(OF_NO_DATE)}")
    names = arguments.names or BENCHMARKS
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    Brevity.is_on = arguments.smoke
    console, rows, when = Console(stderr=True), list[Ratio](), circumstances()
    for name in names:
        with console.status(f"measuring: {name}"):
            rows += (ratios := in_its_own_process(name))
        for ratio in ratios:
            console.print(f"{ratio.what}, to {ratio.limit_name}: {ratio.cells()[4]}")
        if arguments.json is not None:
            # After each: what was measured for half an hour is kept whatever becomes of the rest.
            write_ratios(arguments.json, rows, when)
    print_table(HEADER, (ratio.cells() for ratio in rows))
    if arguments.plot is not None:
        draw_ratios(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
