"""Many records at once, from their columns."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def in_bulk(kind: type[T], *columns: Sequence[Any]) -> list[T]:
    """Records of a dataclass with slots, from a column of values for each of its fields, in their order.

    The constructor is not called, nor what it checks: that is for the caller to know of the columns as a whole. It
    would take several times as long.

    Raises:
        ValueError: the columns are not as many as the fields, or not all of one length.
    """
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    records = [object.__new__(kind) for _ in columns[0]]
    for field, column in zip(fields, columns, strict=True):
        if len(column) != len(records):
            raise ValueError(f"{len(column)} values of {field.name} for {len(records)} of {kind.__name__}")
        # The slot's own setter, which a frozen class has too; the loop runs in C.
        deque(map(getattr(kind, field.name).__set__, records, column), maxlen=0)
    return records
