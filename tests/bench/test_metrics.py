"""The table of scores before and after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import metrics


def test_the_table_says_what_moved_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    passages = [{"id": f"p{n}", "title": f"Title {n}", "text": "It is so. Not otherwise."} for n in range(2)]
    questions = [
        {"id": "q0", "question": "Is it?", "answers": ["no"], "supporting_ids": ["p0"]},
        {"id": "q1", "question": "When?", "answers": ["1914-1918"], "supporting_ids": ["p1"]},
    ]
    for name, rows in (("corpus", passages), ("dev", questions)):
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["metrics", "--root", str(tmp_path), "set/dev.jsonl"])
    metrics.main()
    table = capsys.readouterr().out.splitlines()
    cells = {row.split(" | ")[1]: [cell.strip() for cell in row.split(" | ")[2:]] for row in table[2:]}
    assert cells["gold"][:3] == ["100.0", "100.0", "100.0"]
    assert cells["gold, typed otherwise"][0] == "50.0 to 100.0"
    assert cells["gold, typed otherwise"][-1] == "writing 1 |"
    assert cells["sentence with the gold"][2] == "100.0 to 50.0"
    assert cells["sentence with the gold"][-1] == "yes, no 1 |"
