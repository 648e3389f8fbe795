"""The commands and the files that tests of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TRAIN = ("train", "--config", "config.yaml", "--run", "run")
COLD_START = ("cold-start", "--config", "config.yaml", "--out", "cold_start.parquet")


def passage(number: int, **other: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "title": f"Maker {number}",
        "text": f"Maker {number} was founded by Ada.",
    } | other


def question(name: str) -> dict[str, Any]:
    hop = {
        "question": "Who founded Maker 1?",
        "answer": "Ada",
        "evidence": "Ada founded it.",
        "supporting_id": "p1",
    }
    return {"id": name, "question": f"Question {name}?", "answers": ["Ada"], "decomposition": [hop]}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
