"""One whole EM iteration of the demo on the device: cold start, E-step, M-step, push, evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.gpu.rows import Row, at_least

SMALL = [
    "data.train_limit=8",
    "data.dev_limit=4",
    "data.test_limit=4",
    "cold_start.questions=2",
    "rollout.samples=2",
]


def run(device: str, scratch: Path) -> list[Row]:
    overrides = [
        "em.iterations=1",
        "evaluation.baselines=false",
        f"cluster.devices={'gpu' if device == 'cuda' else 'cpu'}",
    ]
    if device == "cpu":
        overrides += [*SMALL, "rollout.workers=1", "learner.num_ranks=1"]
    run_directory = scratch / "demo"
    command = [sys.executable, "-m", "pipeline.cli", "demo", "--run", str(run_directory), *overrides]
    subprocess.run(command, check=True)
    report = json.loads((run_directory / "report.json").read_text(encoding="utf-8"))
    rows = [Row(f"demo, {name}: test EM", float(scores["em"]), "") for name, scores in report["test"].items()]
    for iteration in (report["cold_start"], *report["iterations"]):
        rows += [
            Row(f"demo, iteration {iteration['iteration']}: {phase}", seconds, "s")
            for phase, seconds in iteration["phase_seconds"].items()
        ]
    (engines,) = report["iterations"][-1]["train"]["engines"].values()
    rows += [
        Row("demo: prompt tokens in the engines' cache", engines["cache_hits"], "%"),
        Row("demo: preemptions", engines["preemptions"], ""),
    ]
    best, start = (float(report["test"][name]["em"]) for name in ("best", "cold_start"))
    return [
        *rows,
        at_least("demo: test EM of the best iteration less the cold start's", best - start, "", 0.0),
    ]
