"""What an estimate reads off the run's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.core.config.loading import load_config
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.observed import observe

ROOT = Path(__file__).parents[4]
TINY = ROOT / "models" / "tiny-searcher"
WORDS = "The river Aller rises in the north and ends in a lake."


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three questions of two, three and no gold passages; two passages."""
    write(tmp_path / "corpus.jsonl", [{"id": str(n), "title": "Aller", "text": WORDS} for n in range(2)])
    gold: list[list[str]] = [["0", "1"], ["0", "1", "2"], []]
    questions = [
        {"id": str(n), "question": f"Where does river {n} end?", "answers": ["a lake"], "supporting_ids": ids}
        for n, ids in enumerate(gold)
    ]
    write(tmp_path / "train.jsonl", questions)
    write(tmp_path / "dev.jsonl", questions[:1])
    return tmp_path


def observed(data: Path, *overrides: str, assumptions: Assumptions | None = None) -> Assumptions:
    given = [f"data.root={data}", f"model.path={TINY}", "data.test=[]", *overrides]
    return observe(load_config(ROOT / "configs" / "demo.yaml", given), assumptions or Assumptions())


def test_questions_are_counted_and_their_gold_passages_are_the_searches(data: Path) -> None:
    found = observed(data)

    assert (found.questions, found.dev_questions, found.test_questions) == (3, 1, 0)
    assert found.searches == 2.5
    assert observed(data, "data.train_limit=2").questions == 2
    assert observed(data, "agent.max_searches=2").searches == 2


def test_tokens_are_those_of_the_model_and_layout(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found = observed(data)

    assert found.prompt_tokens == len(tokenizer("Question: Where does river 0 end?\n").input_ids)
    assert found.turn_tokens == len(tokenizer("Where does river 0 end?").input_ids)
    text = len(tokenizer(f" Aller: {WORDS}").input_ids)
    assert found.passage_tokens is not None and text < found.passage_tokens < text + 20  # tags and numbers
    short = observed(data, "agent.max_document_tokens=8")
    assert short.passage_tokens == found.passage_tokens - (text - 8)


def test_what_the_user_assumes_stays(data: Path) -> None:
    found = observed(data, assumptions=Assumptions(questions=7, searches=1, passage_tokens=90))

    assert (found.questions, found.searches, found.passage_tokens) == (7, 1, 90)
    assert found.prompt_tokens is not None


def test_what_cannot_be_read_stays_open_and_is_named(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "corpus.jsonl").unlink()
    (data / "dev.jsonl").unlink()
    found = observed(data)

    assert (found.passage_tokens, found.dev_questions) == (None, None)
    assert found.prompt_tokens is not None
    assert "data.dev is not read, and a number of questions assumed" in caplog.text
    assert "tokens of questions and passages are assumed: " in caplog.text
