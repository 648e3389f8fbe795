"""Files of predictions: what is written is read again, and what is no such file is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.core.records import Question
from pipeline.core.scoring.answers import ProtocolName
from pipeline.core.scoring.files import read_predictions, suffix_of, write_predictions
from pipeline.core.scoring.metrics import SCORES
from pipeline.core.scoring.prediction import Prediction

QUESTIONS = [Question(name, f"Question {name}?", ("Orvane",)) for name in ("a", "b")]
SAID = Prediction(
    answer="Beyonc\u00e9",
    facts=frozenset({("Orvane", 1), ("Orvane", 0)}),
    triples=(),
    paragraphs=frozenset({3, 1}),
    pages=("9", "7"),
)


@pytest.mark.parametrize("protocol", list(SCORES))
def test_what_is_written_is_read_again(tmp_path: Path, protocol: ProtocolName) -> None:
    path = tmp_path / f"p{suffix_of(protocol)}"
    write_predictions(protocol, path, QUESTIONS, {"a": SAID, "unknown": SAID})
    found = read_predictions(protocol, path, QUESTIONS)
    assert "unknown" not in found
    assert found["a"].answer == SAID.answer
    parts = {"hotpotqa": ("facts",), "2wikimultihopqa": ("facts", "triples")}
    parts |= {"musique": ("paragraphs",), "kilt": ("pages",)}
    for part in parts.get(protocol, ()):
        assert getattr(found["a"], part) == getattr(SAID, part)


def written(tmp_path: Path, protocol: ProtocolName) -> Any:
    path = tmp_path / "p"
    write_predictions(protocol, path, QUESTIONS, {"a": SAID})
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_look_as_the_official_scripts_want_them(tmp_path: Path) -> None:
    (first, second) = written(tmp_path, "musique")
    assert first == {
        "id": "a",
        "predicted_answer": SAID.answer,
        "predicted_support_idxs": [1, 3],
        "predicted_answerable": True,
    }
    assert (second["predicted_answer"], second["predicted_support_idxs"]) == ("", [])
    (first, second) = written(tmp_path, "kilt")
    pages = [{"wikipedia_id": "9"}, {"wikipedia_id": "7"}]
    assert first == {"id": "a", "output": [{"answer": SAID.answer, "provenance": pages}]}
    assert second["output"][0]["answer"]  # KILT's script refuses an empty one
    assert written(tmp_path, "nq")[1] == {"question": "Question b?", "prediction": ""}
    write_predictions("2wikimultihopqa", tmp_path / "p", QUESTIONS, {"a": SAID})
    assert json.loads((tmp_path / "p").read_text()) == {
        "answer": {"a": SAID.answer},
        "sp": {"a": [["Orvane", 0], ["Orvane", 1]], "b": []},
        "evidence": {"a": [], "b": []},
    }


@pytest.mark.parametrize(
    ("protocol", "text", "message"),
    [
        ("hotpotqa", "[]", "expected an object, got list"),
        ("hotpotqa", '{"answer": {"a": 1}}', "a must be a text, got 1"),
        ("hotpotqa", '{"answer": []}', "answer must be an object of question ids"),
        ("hotpotqa", '{"sp": {"a": [["Orvane", "1"]]}}', "sp of a must be [title, number of the sentence]"),
        ("2wikimultihopqa", '{"evidence": {"a": [["x", "y"]]}}', "evidence of a must be [subject, relation"),
        ("exsearch", "{", "not a JSON object in UTF-8"),
        ("triviaqa", '{"c": "x"}', "no prediction for any of the 2 questions; it begins with c"),
        ("musique", '{"id": "a", "predicted_answer": "x"}', "predicted_support_idxs must have a list"),
        ("musique", '{"predicted_answer": "x"}', "a line has no id"),
        ("kilt", '{"id": "a", "output": []}', "output of a must hold one object"),
        ("kilt", '{"id": "a", "output": [{"answer": "x", "provenance": [1]}]}', "provenance of a must"),
        ("nq", "[1", "p.json"),
        ("nq", '{"question": "Question a?"}', "prediction must be a text"),
    ],
)
def test_what_is_no_file_of_predictions_is_refused(
    tmp_path: Path, protocol: ProtocolName, text: str, message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"p\.json") as caught:
        read_predictions(protocol, path, QUESTIONS)
    assert message in str(caught.value)


def test_two_predictions_of_one_question_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"id": "a", "predicted_answer": "x", "predicted_support_idxs": []}
    path.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(UserError, match="two predictions of a"):
        read_predictions("musique", path, QUESTIONS)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.json"):
        read_predictions("exsearch", tmp_path / "nothing.json", QUESTIONS)
