"""The demo under several weightings and seeds: `python -m bench.weightings --out DIR [--seeds 0 1 2]`.

Every run is an ordinary `exsearch demo` over one world and one index; finished ones are kept, so the same command
goes on after an interruption. Ends with a table in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.runs import finished, spread

WEIGHTINGS = {
    "likelihood": ["weighting=likelihood"],
    "posterior": ["weighting=posterior"],
    "posterior, floor 0.1": ["weighting=posterior", "weighting.floor=0.1"],
    "uniform": ["weighting=uniform"],
}
COMMON = ["evaluation.baselines=false"]


def main() -> int:
    """Runs what is missing and prints the table. Ends with the exit code of the first run that fails, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="configuration for all runs, key=value")
    arguments = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for name, keys in WEIGHTINGS.items():
            run = arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            command = ["demo", "--run", str(run), f"seed={seed}", *keys, *COMMON, *arguments.overrides]
            reports.setdefault(name, []).append(finished(run, command))
    print(table(reports))
    return 0


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """Test EM of the best iteration by weighting and seed, with mean and standard deviation; first the cold start's."""
    runs = next(iter(reports.values()))
    rows = {"cold start": [run["test"]["cold_start"]["em"] for run in runs]}
    rows |= {f"`{name}`": [run["test"]["best"]["em"] for run in runs] for name, runs in reports.items()}
    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    lines = [f"| test EM | {seeds} | mean (sd) |", f"|{'---|' * (len(runs) + 2)}"]
    for name, scores in rows.items():
        cells = " | ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {name} | {cells} | {spread(scores)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
