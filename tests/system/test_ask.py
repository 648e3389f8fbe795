"""`exsearch ask` as a person and a program meet it: in a process of its own, with a real engine and index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.chaos]
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-searcher"


def ask(index: Path, *arguments: str, typed: str = "") -> str:
    """What `exsearch ask` prints; nothing on stderr may frighten."""
    command = [sys.executable, "-m", "pipeline.cli", "ask", "--model", str(MODEL), "--index", str(index)]
    result = subprocess.run(
        [*command, *arguments, "agent.documents=1", "model.max_length=1024"],
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    for word in ("Traceback", "WARNING", "FutureWarning", "leaked"):
        assert word not in result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def question(world: Path) -> str:
    row = json.loads((world / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return str(row["question"])


@pytest.fixture(scope="module")
def answer(question: str, index: Path) -> dict[str, Any]:
    return json.loads(ask(index, "--json", question))  # type: ignore[no-any-return]


def test_a_program_gets_one_json_object(question: str, answer: dict[str, Any]) -> None:
    assert answer["question"] == question
    assert answer["steps"] and all(len(step["hits"]) <= 1 for step in answer["steps"])


def test_a_person_gets_the_same_trajectory_step_by_step(
    question: str, index: Path, answer: dict[str, Any]
) -> None:
    lines = ask(index, question).splitlines()
    thoughts = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  think ")]
    assert thoughts[: len(answer["steps"])] == [step["query"] for step in answer["steps"]]
    passages = [line for line in lines if line.startswith("    [1] ")]
    assert len(passages) == sum(len(step["hits"]) for step in answer["steps"])
    assert lines[-1] == f" answer  {answer['answer']}"


def test_questions_that_are_typed_one_after_the_other_get_the_answers_of_a_file_of_them(
    question: str, index: Path, answer: dict[str, Any], tmp_path: Path
) -> None:
    typed = [json.loads(line) for line in ask(index, "--json", typed=f"{question}\nWho?\n").splitlines()]
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(n), "question": q}) + "\n" for n, q in enumerate((question, "Who?")))
    )
    found = [json.loads(line) for line in ask(index, "--json", "--questions", str(file)).splitlines()]
    assert typed[0] == answer
    assert found == [{"id": str(n), **one} for n, one in enumerate(typed)]
