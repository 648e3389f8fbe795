"""One record of a data set as a question of ours, and the passages that it brings along.

A passage's id is made of its words, so that the same paragraph is one passage wherever it comes from, and corpora of
several sets unite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.data.fields import Row, fields_of
from pipeline.core.data.question_rows import to_question
from pipeline.core.data.split_names import Split
from pipeline.core.records import Evidence, Paragraph, Question
from retriever_service.passages.corpus import Passage, words_hash

_UNKNOWN = ("", "<unk>")
_DECOMPOSITION = ("decomposition", "question_decomposition")


@dataclass(frozen=True, slots=True)
class Converted:
    """A row for our file, and the passages of its context."""

    row: Mapping[str, Any]
    passages: Sequence[Passage]


class Unusable(ValueError):
    """A record is no question that can be scored; the message is the reason, fit for counting."""


def convert(
    record: Mapping[str, Any], place: str, split: Split, names: Mapping[str, Sequence[str]]
) -> Converted:
    """The row and the passages of a record.

    Args:
        names: other names of entities by their Wikidata id; see `Origin.names`.

    Raises:
        Unusable: it has no answer.
        UserError: it is no question at all; names `place`.
    """
    fields = fields_of(record)
    if not _has_answer(fields):
        raise Unusable("no answer is given")
    if fields.get("answerable") is False:
        raise Unusable("marked as not answerable")
    question = to_question(_with_aliases(record, fields, names), place, with_evidence=True)
    evidence = question.evidence or Evidence()
    passages = [_passage(paragraph) for paragraph in evidence.context]
    ids = [passage.id for passage in passages]
    supporting = [ids[place] for place in evidence.supporting_paragraphs]
    row = {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "type": question.type or str(fields.get("prop") or ""),
        "hops": question.hops,
        "supporting_ids": list(dict.fromkeys(supporting or question.supporting_ids)),
        "decomposition": _decomposition(fields, question, ids),
        "context_ids": ids,
        **_evidence(evidence, with_context=split != "train"),
    }
    return Converted(
        {name: value for name, value in row.items() if value not in (None, "", [], {})},
        [passage for passage in passages if passage.text],
    )


def _has_answer(fields: Row) -> bool:
    answer = fields.get("answer")
    if isinstance(answer, Mapping):
        return fields_of(answer).get("value") not in _UNKNOWN
    names = ("answers", "golden_answers", "possible_answers", "answer")
    value = next((fields[name] for name in names if name in fields), None)
    return bool(value) and value not in _UNKNOWN and value != [""]


def _passage(paragraph: Paragraph) -> Passage:
    title, text = paragraph.title.strip(), paragraph.text
    return Passage(paragraph.id or f"p{words_hash(Passage('', title, text)):016x}", title, text)


def _with_aliases(
    record: Mapping[str, Any], fields: Row, names: Mapping[str, Sequence[str]]
) -> Mapping[str, Any]:
    """2WikiMultihopQA: other names of the answer, and of the entities of the evidence."""
    if not names:
        return record
    entities = {
        entity: list(names[id_])
        for triple, ids in zip(fields.get("evidences", []), fields.get("evidences_id", []), strict=False)
        for entity, id_ in ((triple[0], ids[0]), (triple[2], ids[2]))
        if names.get(id_)
    }
    answers = list(names.get(fields.get("answer_id", ""), []))
    return {**record, "answer_aliases": answers, "entity_aliases": entities}


def _decomposition(fields: Row, question: Question, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Resolved steps, with the ids of the paragraphs that MuSiQue numbers."""
    entries: Sequence[Any] = next((fields[name] for name in _DECOMPOSITION if fields.get(name)), [])
    numbers = [paragraph.get("idx") for paragraph in fields.get("paragraphs", [])]
    place_of = {number: place for place, number in enumerate(numbers)}
    steps = []
    for entry, hop in zip(entries, question.decomposition if entries else (), strict=True):
        place = place_of.get(entry.get("paragraph_support_idx"))
        step = asdict(hop) | ({"supporting_id": ids[place]} if place is not None else {})
        steps.append({name: value for name, value in step.items() if value})
    return steps


def _evidence(evidence: Evidence, *, with_context: bool) -> dict[str, Any]:
    """What protocols of evaluation compare with. Nothing is trained on it, so rows of train leave out the sentences."""
    facts = [list(fact) for fact in evidence.supporting_facts]
    context = [[paragraph.title, list(paragraph.sentences)] for paragraph in evidence.context]
    return {
        "supporting_facts": facts,
        "evidences": [list(triple) for triple in evidence.triples],
        "entity_aliases": {name: list(others) for name, others in evidence.aliases.items()},
        "context": context if facts and with_context else [],
    }
