"""The evidence that a data set's own row gives along with a question (`Evidence`), in whatever layout.

supporting_facts        [[title, sentence], ...] (the original files of HotpotQA and 2WikiMultihopQA), or
                        {"title": [...], "sent_id": [...]} (their copies in tables: Hub, FlashRAG)
context                 [[title, [sentence, ...]], ...], or {"title": [...], "sentences" | "content": [[...], ...]}
context_ids             ids of the paragraphs in the corpus, in the order of `context`, or alone
paragraphs              [{"idx", "title", "paragraph_text", "is_supporting"}, ...] (MuSiQue)
evidences               [[subject, relation, object], ...], or {"fact" | "entity", "relation", "entity"} lists
entity_aliases          {entity: [other name, ...]} (2WikiMultihopQA's id_aliases.json, resolved)
output                  [{"answer", "provenance": [{"wikipedia_id"}, ...]}, ...] (KILT)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.data.fields import Row, parsed
from pipeline.core.errors import UserError
from pipeline.core.records import Evidence, Paragraph


def read_evidence(row: Row, place: str) -> Evidence:
    """What the row says of its evidence; fields that it lacks are empty.

    Args:
        row: as `fields_of` gives it.

    Raises:
        UserError: a field of another form; names `place` and the field.
    """
    try:
        facts = tuple((_text(title), _number(n)) for title, n in _lines(row, "supporting_facts", _FACT))
        context = _context(row)
        return Evidence(
            supporting_facts=facts,
            triples=tuple(triples(row)),
            aliases={
                _text(name): _texts(others) for name, others in (row.get("entity_aliases") or {}).items()
            },
            context=context,
            supporting_paragraphs=_supporting(row, context, facts),
            provenance=tuple(_pages(output) for output in row.get("output") or []),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{place}: the evidence (supporting_facts, context, paragraphs, evidences or output) is of no form that is "
            f"known ({error}); see docs/formats.md"
        ) from error


def triples(row: Row) -> list[tuple[str, str, str]]:
    """2WikiMultihopQA's (subject, relation, object).

    Raises:
        ValueError, TypeError: they are none.
    """
    return [
        (_text(subject), _text(relation), _text(object_))
        for subject, relation, object_ in _lines(row, "evidences", _TRIPLE)
    ]


_FACT = (("title",), ("sent_id", "sentence_id"))
_TRIPLE = (("fact", "subject"), ("relation",), ("entity", "object"))
_PARAGRAPH = (("title",), ("sentences", "content"))


def _lines(row: Row, field: str, columns: Sequence[Sequence[str]]) -> list[Sequence[Any]]:
    """The entries of a field that is a list of lists, or an object of columns under these names."""
    value = parsed(row.get(field))
    if not isinstance(value, Mapping):
        return list(value) if value is not None else []
    found = [next((name for name in names if name in value), names[0]) for names in columns]
    return list(zip(*(value[name] for name in found), strict=True))


def _context(row: Row) -> tuple[Paragraph, ...]:
    ids = [str(id_) for id_ in row.get("context_ids") or []]
    if row.get("paragraphs"):
        found = [(_text(p["title"]), _texts(p["paragraph_text"])) for p in row["paragraphs"]]
    else:
        lines = _lines(row, "context", _PARAGRAPH)
        found = [(_text(title), _texts(sentences)) for title, sentences in lines]
    if not found:
        return tuple(Paragraph("", (), id_) for id_ in ids)
    pairs = zip(found, ids or [""] * len(found), strict=True)
    return tuple(Paragraph(title, sentences, id_) for (title, sentences), id_ in pairs)


def _supporting(row: Row, context: Sequence[Paragraph], facts: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """MuSiQue marks paragraphs; elsewhere the titles of the facts, or the ids of the gold passages, say which."""
    if row.get("paragraphs"):
        return tuple(place for place, p in enumerate(row["paragraphs"]) if p.get("is_supporting"))
    titles = {title for title, _ in facts}
    ids = {str(id_) for id_ in row.get("supporting_ids") or []}
    return tuple(place for place, p in enumerate(context) if (p.title in titles if p.title else p.id in ids))


def _pages(output: Row) -> tuple[str, ...]:
    provenance = output.get("provenance") or []
    return tuple(dict.fromkeys(str(page["wikipedia_id"]) for page in provenance if "wikipedia_id" in page))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(_text(value) for value in values)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value
