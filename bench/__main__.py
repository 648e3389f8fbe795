"""Run all benchmarks, or those named: `python -m bench [NAME ...]`; the names are those of `BENCHMARKS`."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from bench import checkpoint, encode, examples, learner, push, retrieval, scale
from bench.measure import HEADER

BENCHMARKS = {
    "learner": learner.run,
    "examples": examples.run,
    "checkpoint": checkpoint.run,
    "encode": encode.run,
    "retrieval": retrieval.run,
    "push": push.run,
    "scale": scale.run,
}


def main(names: list[str]) -> int:
    """Print one row per ratio. Returns the exit code: 2 for an unknown name."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    console = Console()
    table = Table(*HEADER.split("; "))
    for name in names or BENCHMARKS:
        with console.status(f"measuring: {name}"):
            ratios = BENCHMARKS[name]()
        for ratio in ratios:
            table.add_row(*ratio.cells())
            console.print(f"{ratio.what}: {ratio.cells()[4]}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
