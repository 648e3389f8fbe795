"""One row of a question file, whatever data set it is from, as a `Question`.

Guarantees: the canonical answer comes first; nothing is made up but the id of a row that has none; a mistake is
refused with its place.

    id, question            also `_id`, `question_id`, `qid`, and `input` (KILT). A row without an id gets one that is
                            made from its question
    answers                 a list, or one text: also as `answer`, `golden_answers` (FlashRAG), `possible_answers`
                            (PopQA). `answer` may be TriviaQA's {value, aliases, ...}; `answer_aliases` (MuSiQue)
                            are accepted answers as well; `output` is KILT's [{answer, provenance}]
    type, hops              optional labels for the evaluation's break-down; MuSiQue has them in its ids
    supporting_ids          optional: ids of the gold passages in the corpus
    decomposition           optional: see `core.data.decompositions`; also `question_decomposition` (MuSiQue)
    evidences               optional: [[subject, relation, object]] (2WikiMultihopQA)
    metadata                optional: an object that may hold any of these (FlashRAG)

Names are the same in any case, with or without underscores. Other fields are ignored, but for those of
`core.data.evidence` where they are asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.core.data.decompositions import hops_of_triples, resolved_hops
from pipeline.core.data.evidence import read_evidence, triples
from pipeline.core.data.fields import Row, fields_of, ids_of, is_id, parsed, shown, text_of
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question

_QUESTION = ("question", "input")
_ID = ("id", "question_id", "qid")
_ANSWERS = ("answers", "golden_answers", "possible_answers", "answer", "output")
_DECOMPOSITION = ("decomposition", "question_decomposition")
_MUSIQUE_ID = re.compile(r"(\dhop\d?)__")
_HOPS = re.compile(r"(\d+)hop")


def to_question(record: Mapping[str, Any], place: str, *, with_evidence: bool = False) -> Question:
    """The question of a row.

    Raises:
        UserError: it is none; names `place`, the field and the mend.
    """
    row = fields_of(record)
    text = text_of(row, _QUESTION, place)
    id_ = _id(record, row, text, place)
    hops = _decomposition(row, place)
    musique = _MUSIQUE_ID.match(id_)
    type_ = str(row.get("type") or (musique[1] if musique else ""))
    return Question(
        id=id_,
        text=text,
        answers=_answers(row, place),
        type=type_,
        hops=_num_hops(row, type_, hops, place),
        supporting_ids=ids_of(row, "supporting_ids", place),
        decomposition=hops,
        evidence=read_evidence(row, place) if with_evidence else None,
    )


def _id(record: Mapping[str, Any], row: Row, text: str, place: str) -> str:
    name = next((name for name in _ID if name in row), "id")
    if name not in row and not {"id", "_id"} & record.keys():
        return f"q{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    value = row.get(name)
    if not is_id(value) or not str(value).strip():
        raise UserError(
            f"{place}: id must be a text or a whole number, got {shown(value)}; give every question an id"
        )
    return str(value)


def _answers(row: Row, place: str) -> tuple[str, ...]:
    name = next((name for name in _ANSWERS if name in row), None)
    if name is None:
        raise UserError(f"{place}: there is no answers (a list of strings) and no answer (a string)")
    given = row[name] if name == "answer" else parsed(row[name])
    values = [given] if isinstance(given, str) else given
    if name == "output":
        values = [output["answer"] for output in _objects(given, name, place) if output.get("answer")]
    elif isinstance(given, Mapping):
        values = _of_triviaqa(given)
    elif name == "answer" and isinstance(values, list):
        values = [*values, *(row.get("answer_aliases") or [])]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(
            f'{place}: {name} must be strings, got {shown(row[name])}; put numbers in quotes ("1984")'
        )
    answers = tuple(dict.fromkeys(value.strip() for value in values))
    if not answers or "" in answers:
        raise UserError(f"{place}: {name} has no answer or an empty one: {shown(row[name])}")
    return answers


def _of_triviaqa(answer: Mapping[str, Any]) -> list[Any]:
    """The canonical answer, then its aliases. The normalised ones are the same to every metric."""
    fields = fields_of(answer)
    canonical = [fields["value"]] if "value" in fields else []
    return [*canonical, *(fields.get("aliases") or []), *(fields.get("human_answers") or [])]


def _objects(value: Any, name: str, place: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise UserError(f"{place}: {name} must be a list of objects, got {shown(value)}")
    return value


def _num_hops(row: Row, type_: str, hops: Sequence[Hop], place: str) -> int | None:
    if (given := row.get("hops", "")) != "":
        given = int(given) if isinstance(given, str) and given.isdecimal() else given
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise UserError(f"{place}: hops must be a whole number, got {shown(given)}")
        return given
    if match := _HOPS.match(type_):
        return int(match[1])
    return len(hops) or None


def _decomposition(row: Row, place: str) -> tuple[Hop, ...]:
    entries: Iterable[Any] = next((row[name] for name in _DECOMPOSITION if row.get(name)), [])
    if entries:
        return resolved_hops(entries, place)
    try:
        return hops_of_triples(triples(row))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{place}: evidences must be [subject, relation, object] triples, got {shown(row['evidences'])}"
        ) from error
