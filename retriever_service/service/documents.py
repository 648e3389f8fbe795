"""Documents of Search-R1 servers, which are not ours: whatever is clear is taken as it is meant.

- a bare document, where a score beside it was asked for, and a score that is no number: the score is 0, the order
  is the server's;
- a number as id, title or text: its digits (17.0 is "17"); null, or none: empty;
- `title` and `text`, or `contents` with the title on its first line, in quotes or not; the contents too where the text
  is blank, for Search-R1's own BM25 server takes the only line of a passage for its title;
- a title alone: a passage with an empty text;
- null in place of the documents of a query: nothing was found; more documents than were asked for: the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import read_passage
from retriever_service.passages.hits import Hit

_SHOWN_CHARS = 300


def documents_hits(result: Any, k: int, where: str) -> list[Hit]:
    """The hits of one query, in the server's order; what it gave beyond `k` is left out.

    Args:
        result: the JSON of one query's documents.
        where: the server, for messages.

    Raises:
        RetrieverError: a document with neither title nor text, or with fields that are no text.
        TypeError, AttributeError, ValueError: not documents at all, or text that is not valid Unicode.
    """
    documents = [] if result is None else result[:k]
    return [_hit(document, f"a passage from {where}") for document in documents]


def _hit(item: Mapping[str, Any], where: str) -> Hit:
    document = item.get("document", item)
    passage = read_passage(_in_our_words(document, where), where)
    if not passage.title.strip() and not passage.text.strip():
        raise RetrieverError(f"{where} has neither title nor text: {str(item)[:_SHOWN_CHARS]!r}")
    for text in (passage.id, passage.title, passage.text):
        text.encode()
    return Hit(passage, _score(item.get("score")))


def _in_our_words(document: Mapping[str, Any], where: str) -> dict[str, str]:
    """Id and either contents or title and text, as texts."""
    fields = {name: _text(document.get(name), name, where) for name in ("title", "text", "contents")}
    id_ = {"id": _text(document.get("id", document.get("_id")), "id", where)}
    if not fields["text"].strip() and fields["contents"].strip():
        return id_ | {"contents": fields["contents"]}
    return id_ | {"title": fields["title"], "text": fields["text"]}


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RetrieverError(f"{where}: field {name!r} must be a string, is {type(value).__name__}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _score(value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return score if math.isfinite(score) else 0.0
