"""Gold decompositions of questions as hops, resolved: "#1" is replaced by the answer of the first hop.

[{question, answer, evidence?, supporting_id?}]     may use "X >> relation" (MuSiQue)
[subject, relation, object]                         2WikiMultihopQA's `evidences`
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pipeline.core.data.fields import is_id, text_of
from pipeline.core.errors import UserError
from pipeline.core.records import Hop

_REFERENCE = re.compile(r"#(\d+)")
# Wikidata relations that read as a verb phrase behind their subject ("X educated at"), not as a noun.
_VERB_PHRASE = re.compile(
    r"^(applies|contains|crosses|educated|follows|has|licensed|located|named|owned|shares)\b"
    r"|\b(after|at|by|from|in|of|to|with)$"
)


def resolved_hops(entries: Any, place: str) -> tuple[Hop, ...]:
    """Hops of {question, answer, ...} objects, references to earlier answers filled in.

    Raises:
        UserError: they are none; names `place` and the entry.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{place}: decomposition must be a list of objects with question and answer")
    hops: list[Hop] = []
    for entry in entries:
        answers = [hop.answer for hop in hops]

        def earlier(match: re.Match[str], answers: list[str] = answers) -> str:
            number = int(match[1])  # "#1" in a first hop is no reference but text ("the #1 song of ...")
            return answers[number - 1] if 1 <= number <= len(answers) else match[0]

        where = f"{place}: decomposition[{len(hops)}]"
        subject, arrow, relation = (
            part.strip() for part in text_of(entry, ["question"], where).partition(">>")
        )
        query = relation_query(subject, relation) if arrow and relation else f"{subject}{arrow}{relation}"
        hops.append(
            Hop(
                question=re.sub(r"\s+([?.!,])", r"\1", _REFERENCE.sub(earlier, query)),
                answer=text_of(entry, ["answer"], where),
                evidence=str(entry.get("evidence") or ""),
                supporting_id=_supporting_id(entry, where),
            )
        )
    return tuple(hops)


def _supporting_id(entry: dict[str, Any], where: str) -> str:
    value = entry.get("supporting_id")
    if value is None or is_id(value):
        return "" if value is None else str(value)
    raise UserError(f"{where}: supporting_id must be a string or a whole number, got {value!r}")


def hops_of_triples(triples: Iterable[tuple[str, str, str]]) -> tuple[Hop, ...]:
    """Hops of (subject, relation, object); several objects of one subject and relation make one hop."""
    objects: dict[tuple[str, str], list[str]] = {}
    for triple in triples:
        subject, relation, object_ = (part.strip() for part in triple)
        objects.setdefault((subject, relation), []).append(object_)
    return tuple(
        Hop(
            question=relation_query(subject, relation),
            answer=", ".join(values),
            evidence=_relation_statement(subject, relation, ", ".join(values)),
        )
        for (subject, relation), values in objects.items()
    )


def relation_query(subject: str, relation: str) -> str:
    """A search query for a knowledge-base relation: "director of Bloody Moon", "Ada educated at"."""
    return f"{subject} {relation}" if _VERB_PHRASE.search(relation) else f"{relation} of {subject}"


def _relation_statement(subject: str, relation: str, object_: str) -> str:
    verb_phrase = _VERB_PHRASE.search(relation)
    return f"{subject} {relation} {object_}." if verb_phrase else f"The {relation} of {subject} is {object_}."
