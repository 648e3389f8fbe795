"""The columnar (Arrow) form of records: what lies in the Parquet files of a run.

No token becomes a Python object, on the way in or out: hundreds of millions of them pass through here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.core.arrow_lists import arrays_of, entries_of, list_array, offsets_of, optional_arrays_of
from pipeline.core.records import Example, Numbers, Step, StopReason, StoredOutline, Trajectory, count_targets
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

_HIT = pa.struct(
    [("id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("score", pa.float32())]
)
_STEP = pa.struct([("query", pa.string()), ("hits", pa.list_(_HIT)), ("record", pa.string())])

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("sample", pa.int32()),
        ("policy_version", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("answer_start", pa.int32()),
        ("steps", pa.list_(_STEP)),
        ("answer", pa.string()),
        ("stop_reason", pa.string()),
        ("detail", pa.string()),
        ("role", pa.string()),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("proposal_logprobs", pa.list_(pa.float32())),
        ("answer_opening", pa.list_(pa.int32())),
    ]
)

EXAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("unit", pa.string()),
        ("role", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        # `width` is R of a stream of rows, else 0.
        (
            "streams",
            pa.map_(pa.string(), pa.struct([("values", pa.list_(pa.float64())), ("width", pa.int32())])),
        ),
    ]
)

OUTLINE_SCHEMA = pa.schema([EXAMPLE_SCHEMA.field(name) for name in ("id", "unit", "loss_mask", "streams")])
"""The columns that an outline is made of."""

_MEND = "the file holds something else, or was written by another version; make it again"

_PER_TOKEN = ("token_ids", "loss_mask", "logprobs", "proposal_logprobs")


def _plain(value: Any) -> Any:
    """A record as the nested lists and dictionaries that Arrow takes."""
    if isinstance(value, Hit):
        return dataclasses.asdict(value.passage) | {"score": value.score}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def trajectories_to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """One row per trajectory, `TRAJECTORY_SCHEMA`."""
    rows = list(trajectories)

    def column(name: str, kind: pa.DataType) -> pa.Array:
        values = [getattr(row, name) for row in rows]
        if name in _PER_TOKEN:
            return list_array(values, kind.value_type)
        return pa.array([_plain(value) for value in values], kind)

    return pa.Table.from_arrays(
        [column(field.name, field.type) for field in TRAJECTORY_SCHEMA], schema=TRAJECTORY_SCHEMA
    )


def examples_to_table(examples: Iterable[Example]) -> pa.Table:
    """One row per example, `EXAMPLE_SCHEMA`."""
    rows = list(examples)
    streams = EXAMPLE_SCHEMA.field("streams").type
    named = [one for row in rows for one in row.streams.items()]
    widths = [0 if values.ndim == 1 else values.shape[1] for _, values in named]
    stored = pa.StructArray.from_arrays(
        [list_array([values.ravel() for _, values in named], pa.float64()), pa.array(widths, pa.int32())],
        fields=list(streams.item_type),
    )
    names = pa.array([name for name, _ in named], pa.string())
    columns = [
        *(pa.array([getattr(row, name) for row in rows], pa.string()) for name in ("id", "unit", "role")),
        list_array([row.token_ids for row in rows], pa.int32()),
        list_array([row.loss_mask for row in rows], pa.bool_()),
        pa.MapArray.from_arrays(offsets_of([len(row.streams) for row in rows]), names, stored),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA)


def _hit(row: dict[str, Any]) -> Hit:
    return Hit(passage=Passage(id=row["id"], title=row["title"], text=row["text"]), score=row["score"])


def _step(row: dict[str, Any]) -> Step:
    return Step(query=row["query"], hits=tuple(_hit(h) for h in row["hits"]), record=row["record"])


def trajectories_from_table(table: pa.Table) -> list[Trajectory]:
    """Inverse of `trajectories_to_table`. The arrays of numbers are read-only views of the table's.

    Raises:
        ValueError: the table has other columns.
    """
    table = _columns(table, TRAJECTORY_SCHEMA)
    arrays = zip(
        *(arrays_of(table[name]) for name in ("token_ids", "loss_mask", "logprobs")),
        optional_arrays_of(table["proposal_logprobs"]),
        strict=True,
    )
    rows = table.drop_columns(list(_PER_TOKEN)).to_pylist()
    return [
        Trajectory(
            question_id=row["question_id"],
            sample=row["sample"],
            policy_version=row["policy_version"],
            token_ids=token_ids,
            loss_mask=loss_mask,
            logprobs=logprobs,
            answer_start=row["answer_start"],
            steps=tuple(_step(s) for s in row["steps"]),
            answer=row["answer"],
            stop_reason=StopReason(row["stop_reason"]),
            detail=row["detail"],
            role=row["role"],
            log_likelihoods=tuple(row["log_likelihoods"]),
            proposal_logprobs=proposal_logprobs,
            answer_opening=tuple(row["answer_opening"]),
        )
        for row, (token_ids, loss_mask, logprobs, proposal_logprobs) in zip(rows, arrays, strict=True)
    ]


def examples_from_table(table: pa.Table) -> list[Example]:
    """Inverse of `examples_to_table`. The arrays of numbers are read-only views of the table's.

    Raises:
        ValueError: the table has other columns.
    """
    table = _columns(table, EXAMPLE_SCHEMA)
    fields = (
        *(table[name].to_pylist() for name in ("id", "unit", "role")),
        arrays_of(table["token_ids"]),
        arrays_of(table["loss_mask"]),
        _streams_of(table["streams"]),
    )
    return [Example(*row) for row in zip(*fields, strict=True)]


def outlines_from_table(table: pa.Table) -> list[StoredOutline]:
    """Of the examples in a table of `EXAMPLE_SCHEMA`, or of `OUTLINE_SCHEMA` alone.

    Raises:
        ValueError: the table has other columns.
    """
    table = _columns(table, OUTLINE_SCHEMA)
    names = (table[name].to_pylist() for name in ("id", "unit"))
    rows = zip(*names, arrays_of(table["loss_mask"]), _streams_of(table["streams"]), strict=True)
    return [
        StoredOutline(
            id=name,
            unit=unit,
            length=len(loss_mask),
            num_targets=count_targets(loss_mask),
            shapes={stream: values.shape for stream, values in streams.items()},
            numbers={stream: float(v[0]) for stream, v in streams.items() if v.shape == (1,)},
        )
        for name, unit, loss_mask, streams in rows
    ]


def _streams_of(column: pa.ChunkedArray) -> list[dict[str, Numbers]]:
    """The streams of each row."""
    rows = []
    for offsets, entries in entries_of(column):
        names, stored = entries.field(0).to_pylist(), entries.field(1)
        values, widths = arrays_of(pa.chunked_array([stored.field("values")])), stored.field("width")
        streams = [
            flat.reshape(-1, width) if width else flat
            for flat, width in zip(values, widths.to_pylist(), strict=True)
        ]
        rows += [
            dict(zip(names[start:end], streams[start:end], strict=True))
            for start, end in itertools.pairwise(offsets)
        ]
    return rows


def require_columns(names: Sequence[str], schema: pa.Schema) -> None:
    """
    Raises:
        ValueError: a column of the schema is not among these.
    """
    if missing := [name for name in schema.names if name not in names]:
        raise ValueError(f"the columns {', '.join(missing)} are missing: {_MEND}")


def _columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema.

    Raises:
        ValueError: one is missing, or of a type that cannot be taken for that of the schema.
    """
    require_columns(table.column_names, schema)
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"a column has another type ({error}): {_MEND}") from error
