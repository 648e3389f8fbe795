"""Metadata filters: what they match, what they mean the same as, what they refuse."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.passages import corpus as corpus_module
from retriever_service.passages.corpus import Corpus, Passage, write_passages
from retriever_service.passages.filters import Filter, MetadataColumns

CITIES: list[dict[str, Any]] = [
    {"year": 1990, "lang": "en", "kind": "city"},
    {"year": 1999.5, "lang": "de", "kind": "city"},
    {"year": 2000, "lang": "fr", "kind": "town"},
    {},
    {"year": "1995", "lang": ["en", "de"], "kind": None},
    {"year": {"from": 1995}, "lang": [], "kind": True},
]
NUMBERS = st.integers(-3, 3) | st.sampled_from([0.5, -1.5, 2.0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "b", "1"])
CONDITIONS = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), NUMBERS, min_size=1)
)


def columns(path: Path, metadata: list[dict[str, Any]]) -> MetadataColumns:
    write_passages([Passage(str(i), "", "text", fields) for i, fields in enumerate(metadata)], path)
    return MetadataColumns(Corpus(path))


def matches(tmp_path: Path, conditions: dict[str, Any], metadata: list[dict[str, Any]] = CITIES) -> list[int]:
    mask = Filter.parse(conditions).mask(columns(tmp_path / "p.arrow", metadata))
    assert mask.shape == (len(metadata),)
    return [row for row, is_allowed in enumerate(mask) if is_allowed]


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ({"kind": "city"}, [0, 1]),
        ({"lang": ["en", "fr"]}, [0, 2, 4]),
        ({"lang": []}, []),
        ({"year": {"gte": 1990, "lt": 2000}}, [0, 1]),
        ({"year": {"gt": 1990, "lte": 2000}}, [1, 2]),
        ({"year": {"gt": 2000}}, []),
        ({"year": {"gt": 5, "lt": 3}}, []),
        ({"year": {"lt": "2"}}, [4]),
        ({"year": 1990.0}, [0]),
        ({"year": 1995}, []),
        ({"kind": None}, [4]),
        ({"kind": True}, [5]),
        ({"kind": 1}, []),
        ({"year": {"gte": 1990}, "lang": "de"}, [1]),
        ({"nowhere": "city"}, []),
        ({}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_passages_that_fulfil_all_conditions_match(
    tmp_path: Path, conditions: dict[str, Any], rows: list[int]
) -> None:
    assert matches(tmp_path, conditions) == rows


def test_large_numbers_are_compared_exactly(tmp_path: Path) -> None:
    metadata = [{"time": 2**60}, {"time": 2**60 + 1}]
    assert matches(tmp_path, {"time": {"gt": 2**60}}, metadata) == [1]
    assert matches(tmp_path, {"time": 2**60}, metadata) == [0]


def fulfils(value: Any, condition: Any) -> bool:
    """The rules in the module's words, for one value of one passage."""

    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool)

    def equal(a: Any, b: Any) -> bool:
        return a == b and (type(a) is type(b) or (is_number(a) and is_number(b)))

    if isinstance(condition, dict):
        return is_number(value) and all(
            getattr(operator, {"gte": "ge", "lte": "le"}.get(name, name))(value, bound)
            for name, bound in condition.items()
        )
    return any(equal(value, wanted) for wanted in (condition if isinstance(condition, list) else [condition]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.lists(
        st.dictionaries(st.sampled_from("xy"), SCALARS | st.lists(SCALARS, max_size=3)), max_size=9
    ),
    conditions=st.dictionaries(st.sampled_from("xyz"), CONDITIONS),
)
def test_match_is_the_plain_reading_of_the_rules_across_batches_of_the_passage_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metadata: list[dict[str, Any]],
    conditions: dict[str, Any],
) -> None:
    monkeypatch.setattr(corpus_module, "ROWS_PER_BATCH", 4)

    def is_allowed(fields: dict[str, Any]) -> bool:
        return all(
            field in fields
            and any(
                fulfils(value, condition)
                for value in (fields[field] if isinstance(fields[field], list) else [fields[field]])
            )
            for field, condition in conditions.items()
        )

    expected = [row for row, fields in enumerate(metadata) if is_allowed(fields)]
    assert matches(tmp_path, conditions, metadata) == expected


def test_filters_that_mean_the_same_are_equal_and_hash_alike() -> None:
    one = Filter.parse({"a": ["y", "x", "x"], "b": {"lt": 2.0, "gt": 1}, "c": [1]})
    other = Filter.parse({"c": 1.0, "b": {"gt": 1.0, "lt": 2}, "a": ("x", "y")})
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [{"a": 1}, {"a": "true"}, {"a": False}, {"a": {"gte": 1}}, {"b": True}, {"a": True, "b": True}, {}],
)
def test_filters_that_mean_something_else_are_not_equal(other: dict[str, Any]) -> None:
    assert Filter.parse({"a": True}) != Filter.parse(other)


@given(st.dictionaries(st.text(max_size=3), CONDITIONS))
def test_filter_survives_its_journey_as_json(conditions: dict[str, Any]) -> None:
    parsed = Filter.parse(conditions)
    assert Filter.parse(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"year": {"ge": 1990}}, r"'year': a range has the operators gt, gte, lt, lte, got 'ge'"),
        ({"year": {}}, "'year': a range has the operators .*, got none"),
        ({"year": {"gte": 1990, "lt": "2000"}}, "'year': the bounds of a range must all be numbers or all"),
        ({"year": {"gte": True}}, "'year': the bounds of a range"),
        ({"year": {"gte": None}}, "'year': the bounds of a range"),
        ({"year": {"gte": [1]}}, r"'year': expected a string, .*, got \[1\]"),
        ({"lang": ["en", ["de"]]}, r"'lang': expected a string, .*, got \['de'\]"),
        ({"lang": [{"gte": 1}]}, "'lang': expected a string"),
        ({"year": float("nan")}, "'year': expected a string, a finite number"),
        ({1: "x"}, "fields of a filter must be strings, got 1"),
        ([("year", 1990)], "must be an object"),
    ],
)
def test_what_is_no_filter_is_refused_with_the_field(conditions: Any, message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        Filter.parse(conditions)
