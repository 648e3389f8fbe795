"""A finished run with all that the commands which look at runs read, made without Ray in a second."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.core.config.loading import load_config
from pipeline.core.models import write_checksums
from pipeline.core.run import RunDirectory, write_json
from pipeline.em_report import em_report
from tests.pipeline.report_support import scores
from tests.pipeline.view_support import Writer, asked

DEV = ("0000", "1000", "1010")
"""Which of four questions are right in iterations 0, 1 and 2."""


def finished_run(path: Path, model: Path) -> None:
    """Of two iterations on four questions; each has exported the model."""
    writer = Writer(path, asked(len(DEV[0])))
    for t in (1, 2):
        writer.sampled(t)
    for t, right in enumerate(DEV):
        writer.evaluated(f"iterations/{t:04d}/evaluation", right)
    tests = {"base": DEV[0], "cold_start": DEV[1], "best": DEV[2]}
    for name, right in tests.items():
        writer.evaluated(f"test/{name}", right)
    config = load_config(path / "config.yaml")
    with RunDirectory(path, config) as run:
        for t, right in enumerate(DEV):
            dev = scores(100 * right.count("1") / len(right))
            write_json(run.at(f"{t}/evaluation.json"), {"scores": dev, "push": {}, "seconds": 1.0})
            run.once(f"{t}/searcher/train", lambda: {"loss": 0.5})
            shutil.copytree(model, run.at(f"{t}/searcher/model"))
            write_checksums(run.at(f"{t}/searcher/model"))
            run.close_iteration(t)
        for t, (name, right) in enumerate(tests.items()):
            found = scores(100 * right.count("1") / len(right))
            write_json(run.at(f"test/{name}.json"), {"iteration": t, **found, "seconds": 1.0})
        write_json(run.at("report.json"), em_report(run, config))
