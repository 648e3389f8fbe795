"""Fields of a row: found under the names that data sets have for them, checked, and complained about."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.errors import UserError

Row = Mapping[str, Any]

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return _REPR.repr(value)


def fields_of(record: Mapping[str, Any]) -> Row:
    """The fields of a record and of its `metadata`, without those that are null, under our spelling of their names
    (`Question`, `questionId`). The record goes before its metadata, our own spelling before others.
    """
    metadata = record.get("metadata")
    fields: dict[str, Any] = {}
    for source in (metadata if isinstance(metadata, Mapping) else {}, record):
        given = {name: value for name, value in source.items() if value is not None}
        fields |= {_OURS.get(_folded(name), name): value for name, value in given.items()} | given
    return fields


def _folded(name: str) -> str:
    return name.lower().replace("_", "")


_NAMES = (
    "id question_id qid question input type hops answers golden_answers possible_answers answer answer_aliases output "
    "value aliases human_answers supporting_ids decomposition question_decomposition evidences supporting_facts "
    "context context_ids paragraphs entity_aliases"
)
_OURS = {_folded(name): name for name in _NAMES.split()}
"""Our spelling by the folded name."""


def text_of(row: Row, names: Sequence[str], place: str) -> str:
    """The text of the first of these fields that is there.

    Raises:
        UserError: none is, or it is no text, or an empty one.
    """
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UserError(f"{place}: no field {names[0]} (fields: {', '.join(sorted(row))[:200] or 'none'})")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {name} must be a string that is not empty, got {shown(value)}")
    return value.strip()


def ids_of(row: Row, name: str, place: str) -> tuple[str, ...]:
    """A list of ids, each once, as texts: whole numbers are ids as well.

    Raises:
        UserError: it is no such list.
    """
    values = row.get(name) or []
    if not isinstance(values, list) or not all(map(is_id, values)):
        raise UserError(f"{place}: {name} must be a list of strings or whole numbers, got {shown(values)}")
    return tuple(dict.fromkeys(map(str, values)))


def is_id(value: Any) -> bool:
    """A text or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def parsed(value: Any) -> Any:
    """What a cell of a table holds: a list or an object as JSON, else the text itself."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
