"""Predictions from and to files in each data set's own format, which its official script reads.

hotpotqa            {"answer": {id: text}, "sp": {id: [[title, sentence], ...]}}
2wikimultihopqa     the same, and "evidence": {id: [[subject, relation, object], ...]}
musique             JSON Lines {"id", "predicted_answer", "predicted_support_idxs": [place, ...],
                    "predicted_answerable"}
kilt                JSON Lines {"id", "output": [{"answer", "provenance": [{"wikipedia_id"}, ...]}]}
nq                  JSON Lines {"question", "prediction"}
others              {id: text}
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.records import Question
from pipeline.core.scoring.answers import ProtocolName
from pipeline.core.scoring.prediction import NOTHING, Fact, Prediction, Triple
from retriever_service.files import json_object, writing
from retriever_service.passages.records import open_records

_NO_ANSWER = "-"
"""KILT's script refuses an empty answer; this one is equal to none."""

Predictions = Mapping[str, Prediction]


def suffix_of(protocol: ProtocolName) -> str:
    """What the names of a set's files of predictions end in."""
    return ".jsonl" if protocol in ("musique", "kilt", "nq") else ".json"


def read_predictions(protocol: ProtocolName, path: Path, questions: Sequence[Question]) -> Predictions:
    """Predictions by question id.

    Raises:
        UserError, RetrieverError: no such file, one of another format, or one that has none of the questions.
    """
    try:
        found = _read(protocol, path, questions)
    except _Wrong as error:
        raise UserError(
            f"{path}: {error}; a file of predictions for {protocol} looks as docs/evaluation.md says"
        ) from None
    if not found.keys() & {question.id for question in questions}:
        raise UserError(
            f"{path} has no prediction for any of the {len(questions)} questions; it begins with "
            f"{', '.join(list(found)[:3]) or 'nothing'}, the questions with {questions[0].id}"
        )
    return found


def write_predictions(
    protocol: ProtocolName, path: Path, questions: Sequence[Question], predictions: Predictions
) -> None:
    """Write what is said of these questions, in their order; the file appears whole."""
    own = {question.id: predictions.get(question.id, NOTHING) for question in questions}
    if suffix_of(protocol) == ".jsonl":
        rows = [_row(protocol, question, own[question.id]) for question in questions]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(_object(protocol, own), ensure_ascii=False, indent=1) + "\n"
    with writing(path) as file:
        file.write(text.encode())


class _Wrong(ValueError):
    """What is wrong with a file."""


def _read(protocol: ProtocolName, path: Path, questions: Sequence[Question]) -> dict[str, Prediction]:
    if protocol == "musique":
        return _unique((_id(row), _of_musique(row)) for _, row in open_records(path))
    if protocol == "kilt":
        return _unique((_id(row), _of_kilt(row)) for _, row in open_records(path))
    if protocol == "nq":
        ids = {question.text: question.id for question in questions}
        rows = [(_text(row, "question"), _text(row, "prediction")) for _, row in open_records(path)]
        return _unique((ids.get(asked, asked), Prediction(answer=said)) for asked, said in rows)
    tree = _json_object(path)
    if protocol in ("hotpotqa", "2wikimultihopqa"):
        return _of_hotpotqa(tree, with_triples=protocol == "2wikimultihopqa")
    return {id_: Prediction(answer=_text(tree, id_)) for id_ in tree}


def _json_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"no file of predictions {path}")
    try:
        return json_object(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        hint = (
            "; one object per line is the format of musique, kilt and nq"
            if "Extra data" in str(error)
            else ""
        )
        raise _Wrong(f"not a JSON object in UTF-8 ({error}){hint}") from error


def _unique(found: Iterable[tuple[str, Prediction]]) -> dict[str, Prediction]:
    predictions: dict[str, Prediction] = {}
    for id_, prediction in found:
        if id_ in predictions:
            raise _Wrong(f"two predictions of {id_}")
        predictions[id_] = prediction
    return predictions


def _of_hotpotqa(tree: Mapping[str, Any], with_triples: bool) -> dict[str, Prediction]:
    if not {"answer", "sp", "evidence"} & tree.keys():
        raise _Wrong(f"there is neither answer nor sp in it, but {', '.join(tree)[:100] or 'nothing'}")
    answers, facts = _part(tree, "answer"), _part(tree, "sp")
    triples = _part(tree, "evidence") if with_triples else {}
    return {
        id_: Prediction(
            answer=_text(answers, id_) if id_ in answers else None,
            facts=frozenset(_fact(fact, id_) for fact in _list(facts, id_)) if id_ in facts else None,
            triples=tuple(_triple(one, id_) for one in _list(triples, id_)) if id_ in triples else None,
        )
        for id_ in dict.fromkeys((*answers, *facts, *triples))
    }


def _of_musique(row: Mapping[str, Any]) -> Prediction:
    places = _list(row, "predicted_support_idxs")
    if not all(isinstance(place, int) for place in places):
        raise _Wrong(f"predicted_support_idxs of {_id(row)} must be whole numbers, got {places!r}")
    return Prediction(answer=_text(row, "predicted_answer"), paragraphs=frozenset(places))


def _of_kilt(row: Mapping[str, Any]) -> Prediction:
    output = _list(row, "output")
    if len(output) != 1 or not isinstance(output[0], dict):
        raise _Wrong(f"output of {_id(row)} must hold one object, got {output!r}")
    pages = output[0].get("provenance") or []
    if not isinstance(pages, list) or not all(isinstance(page, dict) for page in pages):
        raise _Wrong(f"provenance of {_id(row)} must be a list of objects, got {pages!r}")
    named = tuple(str(page["wikipedia_id"]) for page in pages if "wikipedia_id" in page)
    return Prediction(answer=_text(output[0], "answer"), pages=named)


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name, {})
    if not isinstance(part, dict):
        raise _Wrong(f"{name} must be an object of question ids, got {type(part).__name__}")
    return part


def _id(row: Mapping[str, Any]) -> str:
    if not isinstance(row.get("id"), str | int):
        raise _Wrong(f"a line has no id: {str(row)[:100]}")
    return str(row["id"])


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise _Wrong(f"{name} must be a text, got {row.get(name)!r}")
    return str(row[name])


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(row.get(name), list):
        raise _Wrong(f"{name} must have a list, got {row.get(name)!r}")
    return list(row[name])


def _fact(value: Any, id_: str) -> Fact:
    match value:
        case [str(title), int(number)]:
            return title, number
    raise _Wrong(f"sp of {id_} must be [title, number of the sentence], got {value!r}")


def _triple(value: Any, id_: str) -> Triple:
    match value:
        case [str(subject), str(relation), str(object_)]:
            return subject, relation, object_
    raise _Wrong(f"evidence of {id_} must be [subject, relation, object], got {value!r}")


def _object(protocol: ProtocolName, own: Predictions) -> Mapping[str, Any]:
    answers = {id_: one.answer for id_, one in own.items() if one.answer is not None}
    if protocol not in ("hotpotqa", "2wikimultihopqa"):
        return answers
    tree: dict[str, Any] = {
        "answer": answers,
        "sp": {id_: sorted([*fact] for fact in one.facts or ()) for id_, one in own.items()},
    }
    if protocol == "2wikimultihopqa":
        tree["evidence"] = {id_: [[*triple] for triple in one.triples or ()] for id_, one in own.items()}
    return tree


def _row(protocol: ProtocolName, question: Question, one: Prediction) -> Mapping[str, Any]:
    if protocol == "musique":
        return {
            "id": question.id,
            "predicted_answer": one.answer or "",
            "predicted_support_idxs": sorted(one.paragraphs or ()),
            "predicted_answerable": True,
        }
    if protocol == "kilt":
        pages = [{"wikipedia_id": page} for page in one.pages or ()]
        return {"id": question.id, "output": [{"answer": one.answer or _NO_ANSWER, "provenance": pages}]}
    return {"question": question.text, "prediction": one.answer or ""}
