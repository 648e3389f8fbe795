"""Filters on the metadata of passages.

    {"year": {"gte": 1990, "lt": 2000}, "lang": ["en", "de"], "kind": "city"}

All conditions hold: a scalar asks for equality, a list for membership, an object for a range (`gt`, `gte`, `lt`, `lte`,
over numbers or over strings). A passage fulfils a condition if its field has such a value, or is a list that holds one;
a passage without the field, or with an object in it, never does.

Guarantees:
- filters that mean the same by these rules in another order or spelling (`1` and `1.0`, `"a"` and `["a"]`) are equal,
  others are not (`true` is not `1`): a filter may be part of a cache key;
- numbers are compared exactly, whatever their size.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Corpus
from retriever_service.passages.ranked import Mask

_Key = tuple[int, Any]
"""(kind, value): sorts all scalars, and keeps apart what Python takes for equal (True == 1)."""
_NULL, _BOOL, _NUMBER, _STRING = range(4)
_OPERATORS = ("gt", "gte", "lt", "lte")


@dataclass(frozen=True, slots=True)
class OneOf:
    """The field has one of these values."""

    values: tuple[_Key, ...]
    """Ascending, each once."""

    def codes(self, keys: list[_Key]) -> npt.NDArray[np.intp]:
        """Where the wanted keys are among `keys`, which ascend."""
        places = [(bisect_left(keys, value), value) for value in self.values]
        found = [place for place, value in places if place < len(keys) and keys[place] == value]
        return np.array(found, dtype=np.intp)

    def to_json(self) -> Any:
        return [value for _, value in self.values]


@dataclass(frozen=True, slots=True)
class Range:
    """The field has a value between these bounds, all of which are of one kind."""

    bounds: tuple[tuple[str, _Key], ...]
    """(operator, bound), in the order of `_OPERATORS`."""

    def codes(self, keys: list[_Key]) -> npt.NDArray[np.intp]:
        """Where the wanted keys are among `keys`, which ascend."""
        kind = self.bounds[0][1][0]
        start, stop = bisect_left(keys, (kind,)), bisect_left(keys, (kind + 1,))
        for operator, bound in self.bounds:
            place = bisect_right(keys, bound) if operator in ("gt", "lte") else bisect_left(keys, bound)
            if operator in ("gt", "gte"):
                start = max(start, place)
            else:
                stop = min(stop, place)
        return np.arange(start, max(start, stop), dtype=np.intp)

    def to_json(self) -> Any:
        return {operator: value for operator, (_, value) in self.bounds}


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions by field, in the order of the fields."""

    conditions: tuple[tuple[str, OneOf | Range], ...]

    @classmethod
    def parse(cls, conditions: Mapping[str, Any]) -> Filter:
        """The filter that a JSON object stands for; see the module.

        Raises:
            RetrieverError: not of that form; names the field.
        """
        if not isinstance(conditions, Mapping):
            raise RetrieverError(f"a filter must be an object of conditions by field, got {conditions!r}")
        if odd := [field for field in conditions if not isinstance(field, str)]:
            raise RetrieverError(f"the fields of a filter must be strings, got {odd[0]!r}")
        return cls(tuple((field, _condition(field, conditions[field])) for field in sorted(conditions)))

    def to_json(self) -> dict[str, Any]:
        """What `parse` makes this filter of."""
        return {field: condition.to_json() for field, condition in self.conditions}

    def mask(self, columns: MetadataColumns) -> Mask:
        """The passages that fulfil every condition."""
        mask = np.ones(columns.count, dtype=bool)
        for field, condition in self.conditions:
            mask &= columns.column(field).mask(condition)
        return mask


class MetadataColumns:
    """The metadata of a corpus by field. A field of all passages is parsed when it is first asked for, and kept."""

    def __init__(self, corpus: Corpus) -> None:
        self.count = len(corpus)
        self._corpus = corpus
        self._columns: dict[str, Column] = {}

    def column(self, field: str) -> Column:
        """The values of one field; an empty column if no passage has it."""
        if field not in self._columns:
            self._columns[field] = Column(self._values(field), self.count)
        return self._columns[field]

    def _values(self, field: str) -> Iterator[tuple[int, Any]]:
        """(row, value), in row order; the values of a list one by one."""
        first = 0
        for chunk in self._corpus.column("metadata").chunks:
            for row, text in enumerate(chunk.to_pylist(), start=first):
                metadata = {} if text is None else json.loads(text)
                value = metadata.get(field, [])
                for element in value if isinstance(value, list) else [value]:
                    yield row, element
            first += len(chunk)


class Column:
    """The values of one field, sorted once, so that a condition looks at distinct values instead of passages."""

    def __init__(self, values: Iterator[tuple[int, Any]], count: int) -> None:
        self._count = count
        numbers: dict[_Key, int] = {}
        rows, entries = array("q"), array("i")
        for row, value in values:
            if (key := _key(value)) is not None:
                rows.append(row)
                entries.append(numbers.setdefault(key, len(numbers)))
        self._keys = sorted(numbers)
        code_of = {numbers[key]: code for code, key in enumerate(self._keys)}
        codes = np.array([code_of[number] for number in range(len(numbers))], dtype=np.int32)
        self._rows = np.array(rows, dtype=np.int64)
        self._codes = codes[np.array(entries, dtype=np.int32)]

    def mask(self, condition: OneOf | Range) -> Mask:
        """The passages with a value that fulfils the condition."""
        wanted = np.zeros(len(self._keys), dtype=bool)
        wanted[condition.codes(self._keys)] = True
        mask = np.zeros(self._count, dtype=bool)
        mask[self._rows[wanted[self._codes]]] = True
        return mask


def _key(value: Any) -> _Key | None:
    """None for what cannot be compared: objects, lists, numbers that are none."""
    if value is None:
        return (_NULL, None)
    if isinstance(value, bool):
        return (_BOOL, value)
    if isinstance(value, str):
        return (_STRING, value)
    if isinstance(value, int):
        return (_NUMBER, value)
    if isinstance(value, float) and math.isfinite(value):
        return (_NUMBER, int(value) if value.is_integer() else value)
    return None


def _condition(field: str, value: Any) -> OneOf | Range:
    if isinstance(value, Mapping):
        return _range(field, value)
    values = value if isinstance(value, list | tuple) else [value]
    keys = {_scalar(field, element) for element in values}
    return OneOf(tuple(sorted(keys)))


def _range(field: str, bounds: Mapping[str, Any]) -> Range:
    unknown = [operator for operator in bounds if operator not in _OPERATORS]
    if unknown or not bounds:
        got = f"got {unknown[0]!r}" if unknown else "got none"
        raise RetrieverError(f"filter on {field!r}: a range has the operators {', '.join(_OPERATORS)}, {got}")
    keys = {operator: _scalar(field, bounds[operator]) for operator in _OPERATORS if operator in bounds}
    kinds = {kind for kind, _ in keys.values()}
    if kinds != {_NUMBER} and kinds != {_STRING}:
        raise RetrieverError(
            f"filter on {field!r}: the bounds of a range must all be numbers or all be strings, got {dict(bounds)}"
        )
    return Range(tuple(keys.items()))


def _scalar(field: str, value: Any) -> _Key:
    key = _key(value)
    if key is None:
        raise RetrieverError(
            f"filter on {field!r}: expected a string, a finite number, true, false or null, or a list of them, got "
            f"{value!r}"
        )
    return key
