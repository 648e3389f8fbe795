"""The metadata of a passage: any object that every reader of JSON can read, for a server sends it with each hit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retriever_service.errors import RetrieverError

MAX_DEPTH = 64
"""Objects and lists within each other; some parsers of JSON stop at a hundred."""


def read_metadata(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The metadata of a record; empty where it has none.

    Raises:
        RetrieverError: no object, or one that cannot be sent as JSON; names `where`.
    """
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise RetrieverError(f"{where}: field 'metadata' must be an object, is {type(metadata).__name__}")
    if metadata and _depth(metadata) > MAX_DEPTH:
        raise RetrieverError(f"{where}: 'metadata' is nested deeper than {MAX_DEPTH} levels; flatten it")
    try:
        json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise RetrieverError(
            f"{where}: 'metadata' has a value that JSON does not have ({error}); give null or a text for it"
        ) from error
    return metadata


def _depth(tree: Any) -> int:
    """Levels of objects and lists, without recursion; stops counting where there are too many."""
    level, depth = [tree], 0
    while level and depth <= MAX_DEPTH:
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [child for nodes in inner for child in nodes if isinstance(child, dict | list)]
        depth += 1
    return depth
