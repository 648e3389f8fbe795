"""The steps of trajectories in Arrow: lists of structs that hold lists of structs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.core.arrow_lists import arrays_of, elements_of, lengths_of, offsets_of
from pipeline.core.bulk import in_bulk
from pipeline.core.records import Step
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

_HIT = pa.struct(
    [("id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("score", pa.float32())]
)
_STEP = pa.struct(
    [
        ("query", pa.string()),
        ("hits", pa.list_(_HIT)),
        ("record", pa.string()),
        ("selected", pa.list_(pa.int32())),
        ("action", pa.string()),
        ("result", pa.string()),
    ]
)

STEPS = pa.list_(_STEP)
"""The type of the column."""


def steps_array(rows: Sequence[tuple[Step, ...]]) -> pa.ListArray:
    """One list of steps per row. What else is known of a passage (its metadata) is left out."""
    steps = list(itertools.chain.from_iterable(rows))
    hits = list(itertools.chain.from_iterable(step.hits for step in steps))
    passages = [hit.passage for hit in hits]
    of_hits = _structs(
        _HIT,
        [passage.id for passage in passages],
        [passage.title for passage in passages],
        [passage.text for passage in passages],
        [hit.score for hit in hits],
    )
    hit_lists = pa.ListArray.from_arrays(offsets_of(len(step.hits) for step in steps), of_hits)
    of_steps = _structs(
        _STEP,
        [step.query for step in steps],
        hit_lists,
        [step.record for step in steps],
        [step.selected for step in steps],
        [step.action for step in steps],
        [step.result for step in steps],
    )
    return pa.ListArray.from_arrays(offsets_of(map(len, rows)), of_steps)


def steps_of(lists: pa.ListArray) -> list[tuple[Step, ...]]:
    """Inverse of `steps_array`.

    Raises:
        ValueError: something in it is null.
    """
    queries, hit_lists, records, selections, actions, results = _fields(lists)
    ids, titles, texts, scores = (field.to_pylist() for field in _fields(hit_lists))
    passages = in_bulk(Passage, ids, titles, texts, [{} for _ in ids])
    hits = iter(in_bulk(Hit, passages, scores))
    steps = iter(
        in_bulk(
            Step,
            queries.to_pylist(),
            list(_cut(hits, hit_lists)),
            records.to_pylist(),
            [tuple(places.tolist()) for places in arrays_of(selections)],
            actions.to_pylist(),
            results.to_pylist(),
        )
    )
    return list(_cut(steps, lists))


def _structs(kind: pa.StructType, *columns: Any) -> pa.StructArray:
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns, kind, strict=True)
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _fields(lists: pa.ListArray) -> list[pa.Array]:
    """Of the structs in these lists, end to end."""
    structs = elements_of(lists)
    fields = [structs.field(place) for place in range(structs.type.num_fields)]
    for array in (lists, structs, *fields):
        if array.null_count:
            raise ValueError(f"{array.null_count} of type {array.type} are null among the steps")
    return fields


def _cut(items: Iterator[Any], lists: pa.ListArray) -> Iterator[tuple[Any, ...]]:
    """The items of each list."""
    return (tuple(itertools.islice(items, length)) for length in lengths_of(lists).tolist())
