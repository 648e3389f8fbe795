"""`exsearch ask` as a person and a program meet it: in a process of its own, with a real engine and index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-searcher"


def test_ask_prints_one_json_object_and_nothing_that_frightens(world: Path, index: Path) -> None:
    row = json.loads((world / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    command = [sys.executable, "-m", "pipeline.cli", "ask", "--json", "--model", str(MODEL)]
    result = subprocess.run(
        [*command, "--index", str(index), row["question"], "agent.documents=1", "model.max_length=1024"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answer = json.loads(result.stdout)
    assert answer["question"] == row["question"]
    assert answer["steps"] and all(len(step["hits"]) <= 1 for step in answer["steps"])
    for word in ("Traceback", "WARNING", "FutureWarning"):
        assert word not in result.stderr
