"""The recipes on the generated encyclopedia under several seeds: `python -m bench.methods --out DIR [--seeds 0 1 2]`.

Every run is an ordinary `exsearch train` over one world and one index; finished ones are kept, so the same command
goes on after an interruption. Ends with two tables in Markdown: scores on the test questions, and scores on the dev
questions against the tokens that were generated for training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.runs import finished, spread

Reports = Mapping[str, Sequence[Mapping[str, Any]]]
"""The reports of each method, one per seed."""

EXSEARCH = [
    "--config=configs/demo.yaml",
    "rollout.workers=2",
    "learner.num_ranks=2",
    "evaluation.baselines=false",
]
METHODS = {
    "ExSearch": EXSEARCH,
    "preference": ["--config=configs/preference-demo.yaml"],
    "ExSearch, one hop": [*EXSEARCH, "data.hops=[1]"],
    "DRO, one hop": ["--config=configs/dro-demo.yaml"],
}


def main() -> int:
    """Runs what is missing and prints the tables. Ends with the exit code of the first run that fails, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--world", type=Path, required=True, help="folder that `exsearch world` has written")
    arguments = parser.parse_args()
    reports: dict[str, list[Mapping[str, Any]]] = {name: [] for name in arguments.methods}
    for seed in arguments.seeds:
        for name, made in reports.items():
            run = arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            command = [
                "train",
                f"--run={run}",
                *METHODS[name],
                f"seed={seed}",
                f"data.root={arguments.world}",
            ]
            made.append(finished(run, command))
    print(test_table(reports))
    print()
    print(dev_table(reports))
    return 0


def test_table(reports: Reports) -> str:
    """EM with its 95 % interval over the questions, and gold recall, at the start and at the best iteration."""
    seeds = [f"seed {report['seed']}" for report in next(iter(reports.values()))]
    lines = [f"| method | {' | '.join(seeds)} | mean (sd) |", f"|{'---|' * (len(seeds) + 2)}"]
    for name, runs in reports.items():
        both = [start_and_best(run) for run in runs]
        for label in ("start", "best"):
            tests = [of_run[label] for of_run in both]
            cells = ["{:.1f} ({:.1f} to {:.1f})".format(test["em"], *test["em_interval"]) for test in tests]
            lines.append(row(f"{name}: EM, {label}", *cells, spread([test["em"] for test in tests])))
        for label in ("start", "best"):
            recalls = [of_run[label]["gold_recall"] for of_run in both]
            cells = [f"{recall:.1f}" for recall in recalls]
            lines.append(row(f"{name}: gold recall, {label}", *cells, spread(recalls)))
    return "\n".join(lines)


def dev_table(reports: Reports) -> str:
    """Per iteration the tokens generated up to it and the dev EM, means over the seeds."""
    lines = [f"| after iteration | {' | '.join(reports)} |", f"|{'---|' * (len(reports) + 1)}"]
    last = max(len(run["iterations"]) for runs in reports.values() for run in runs)
    for t in range(1, last + 1):
        cells = []
        for runs in reports.values():
            until = [run["iterations"][:t] for run in runs if len(run["iterations"]) >= t]
            tokens = mean(sum(map(generated_tokens, rows)) for rows in until)
            cells.append(f"{tokens:,.0f}; {mean(dev_em(rows[-1]) for rows in until):.1f}")
        lines.append(row(str(t), *cells))
    return "\n".join(lines)


def row(*cells: str) -> str:
    """One row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


# ExSearch's report has names of its own.


def start_and_best(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tests of what the method started from, and of its best iteration."""
    test = report["test"]
    return {"start": test["start" if "start" in test else "cold_start"], "best": test["best"]}


def generated_tokens(iteration: Mapping[str, Any]) -> int:
    """Tokens that one iteration generated for training."""
    return int(iteration["sample" if "sample" in iteration else "train"]["generated_tokens"])


def dev_em(iteration: Mapping[str, Any]) -> float:
    """EM on the dev questions after one iteration."""
    scores = iteration["dev"] if "dev" in iteration else iteration["evaluation"]["scores"]
    return float(scores["em"])


if __name__ == "__main__":
    sys.exit(main())
