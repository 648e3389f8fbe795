"""`exsearch benchmark`: the table, JSON, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.pipeline.core.benchmarks.support import write_benchmark


def test_the_table_has_tasks_domains_means_and_what_instructions_change(
    run_command: Any, folder: Path
) -> None:
    write_benchmark(folder)
    result = run_command(
        "benchmark", "./animals.yaml", "measures=[ndcg@10, precision@10, recall@10, all_gold@10]"
    )
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    for name in (
        "bm25",
        "hash",
        "both",
        "land",
        "water",
        "stone",
        "rocks",
        "mean of tasks",
        "mean of domains",
    ):
        assert any(line.startswith(name) for line in lines), name
    assert any(line.startswith("animals and rocks: ndcg@10, in percent") for line in lines)
    assert any(line.split() == ["N@10", "P@10", "R@10", "C@10"] for line in lines)
    assert any(line.startswith("water, instructed") for line in lines)
    assert "hash: with instructions " in result.stdout and " of 2 tasks gain" in result.stdout
    assert "1 of 3 tasks have no instructions, and are in no mean of the arm with: land" in result.stdout
    assert "1 queries of the file are not judged, and not asked: stone 1" in result.stdout
    assert "rankings: 15 made now, 0 kept" in result.stdout
    assert (folder / "runs/benchmarks/animals/report.json").is_file()


def test_programs_get_the_report(run_command: Any, folder: Path) -> None:
    write_benchmark(folder)
    result = run_command("benchmark", "./animals.yaml", "arms=[without]", "--json", "--out", "out")
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "out/report.json").read_text())
    assert report["retrievers"]["bm25"]["gains"] is None


def test_a_benchmark_that_is_none_is_refused(refused: Any) -> None:
    assert "there is no benchmark xyz; there are constraints, mair, " in refused("benchmark", "xyz")
    assert "did you mean toolret?" in refused("benchmark", "tolret")
    assert "give root=DIR" in refused("benchmark", "constraints", "corpora={a: b.jsonl}",
                                      "tasks={t: {domain: d, corpus: a, queries: q.jsonl}}")  # fmt: skip
