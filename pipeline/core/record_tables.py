"""The columnar (Arrow) form of records: what lies in the Parquet files of a run.

No token becomes a Python object, on the way in or out: hundreds of millions of them pass through here. What is known of
a whole column is checked of the whole column; only where something does not fit is each record looked at by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.arrow_lists import (
    arrays_of,
    elements_of,
    lengths_of,
    list_array,
    numbers_of,
    offsets_of,
    optional_arrays_of,
)
from pipeline.core.bulk import in_bulk
from pipeline.core.records import (
    Example,
    Numbers,
    StopReason,
    StoredOutline,
    TokenIds,
    Trajectory,
    count_targets,
)
from pipeline.core.step_columns import STEPS, steps_array, steps_of

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("sample", pa.int32()),
        ("policy_version", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("answer_start", pa.int32()),
        ("steps", STEPS),
        ("answer", pa.string()),
        ("stop_reason", pa.string()),
        ("detail", pa.string()),
        ("role", pa.string()),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("proposal_logprobs", pa.list_(pa.float32())),
        ("answer_opening", pa.list_(pa.int32())),
        ("turn_log_likelihoods", pa.list_(pa.float64())),
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

OUTLINE_SCHEMA = pa.schema(
    [EXAMPLE_SCHEMA.field(name) for name in ("id", "unit", "role", "loss_mask", "streams")]
)
"""The columns that an outline is made of."""

_MEND = "the file holds something else, or was written by another version; make it again"

_TUPLES = ("log_likelihoods", "answer_opening", "turn_log_likelihoods")
"""Columns of few numbers, which records hold as tuples."""

_LATER = ("turn_log_likelihoods",)
"""Columns of trajectories that files of earlier versions have not: there they are empty."""

_STOP_REASONS = {reason.value: reason for reason in StopReason}


def trajectories_to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """One row per trajectory, `TRAJECTORY_SCHEMA`."""
    rows = list(trajectories)

    def column(name: str, kind: pa.DataType) -> pa.Array:
        values = [getattr(row, name) for row in rows]
        if name == "steps":
            return steps_array(values)
        if not pa.types.is_list(kind):
            return pa.array(values, kind)
        if name in _TUPLES:
            values = [np.array(value, kind.value_type.to_pandas_dtype()) for value in values]
        return list_array(values, kind.value_type)

    return pa.Table.from_arrays(
        [column(field.name, field.type) for field in TRAJECTORY_SCHEMA], schema=TRAJECTORY_SCHEMA
    )


def examples_to_table(examples: Iterable[Example]) -> pa.Table:
    """One row per example, `EXAMPLE_SCHEMA`."""
    rows = list(examples)
    streams = [row.streams for row in rows]
    values = [array for own in streams for array in own.values()]
    widths = [0 if array.ndim == 1 else array.shape[1] for array in values]
    kind = EXAMPLE_SCHEMA.field("streams").type
    stored = pa.StructArray.from_arrays(
        [
            list_array([array.ravel() if array.ndim > 1 else array for array in values], pa.float64()),
            pa.array(widths, pa.int32()),
        ],
        fields=list(kind.item_type),
    )
    names = pa.array([name for own in streams for name in own], pa.string())
    token_ids = [row.token_ids for row in rows]
    offsets = offsets_of(map(len, token_ids))  # of the masks as well: an example's is as long as its ids
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.unit for row in rows], pa.string()),
        pa.array([row.role for row in rows], pa.string()),
        list_array(token_ids, pa.int32(), offsets),
        list_array([row.loss_mask for row in rows], pa.bool_(), offsets),
        pa.MapArray.from_arrays(offsets_of(map(len, streams)), names, stored),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA)


def trajectories_from_table(table: pa.Table) -> list[Trajectory]:
    """Inverse of `trajectories_to_table`. The arrays of numbers are read-only views of the table's.

    Raises:
        ValueError: the table has other columns, or what is in them is no trajectory.
    """
    for name in _LATER:
        if name not in table.column_names:
            field = TRAJECTORY_SCHEMA.field(name)
            table = table.append_column(field, pa.array([[]] * len(table), field.type))
    batches = _columns(table, TRAJECTORY_SCHEMA).to_batches()
    return [trajectory for batch in batches for trajectory in _trajectories(batch)]


def _trajectories(batch: pa.RecordBatch) -> list[Trajectory]:
    def column(name: str) -> Sequence[Any]:
        array = batch[name]
        if name == "steps":
            return steps_of(array)
        if name == "stop_reason":
            return [_STOP_REASONS.get(value) or StopReason(value) for value in _scalars(array, name)]
        if name == "proposal_logprobs":
            return optional_arrays_of(array)
        if not pa.types.is_list(array.type):
            return _scalars(array, name)
        if name in _TUPLES:
            return [tuple(values.tolist()) for values in arrays_of(array)]
        return arrays_of(array)

    columns = [column(name) for name in TRAJECTORY_SCHEMA.names]
    lengths, starts = lengths_of(batch["token_ids"]), numbers_of(batch["answer_start"])
    fits = bool(np.all((starts >= 0) & (starts <= lengths))) and all(
        np.array_equal(lengths, lengths_of(batch[name])) for name in ("loss_mask", "logprobs")
    )
    return _records(Trajectory, columns, fits=fits)


def examples_from_table(table: pa.Table) -> list[Example]:
    """Inverse of `examples_to_table`. The arrays of numbers are read-only views of the table's.

    Raises:
        ValueError: the table has other columns, or what is in them is no example.
    """
    batches = _columns(table, EXAMPLE_SCHEMA).to_batches()
    return [example for batch in batches for example in _examples(batch)]


def _examples(batch: pa.RecordBatch) -> list[Example]:
    token_ids, loss_mask, streams = batch["token_ids"], batch["loss_mask"], batch["streams"]
    columns = [
        *(_scalars(batch[name], name) for name in ("id", "unit", "role")),
        arrays_of(token_ids),
        arrays_of(loss_mask),
        _streams_of(streams),
    ]
    lengths = lengths_of(token_ids)
    fits = np.array_equal(lengths, lengths_of(loss_mask)) and _streams_fit(streams, lengths)
    return _records(Example, columns, fits=fits)


def _streams_fit(column: pa.MapArray, lengths: npt.NDArray[np.int32]) -> bool:
    """Whether each stream has one number, or one for each of its row's tokens, which are so many. False also where
    there are rows per target: whether these fit is not looked at here.
    """
    stored = elements_of(column).field(1)
    found, tokens = lengths_of(stored.field("values")), np.repeat(lengths, lengths_of(column))
    return bool(np.all((found == 1) | (found == tokens))) and not numbers_of(stored.field("width")).any()


def _records(kind: Any, columns: Sequence[Sequence[Any]], *, fits: bool) -> list[Any]:
    """Those that are known to fit together as they are; else it is the constructor that finds out what does not."""
    return in_bulk(kind, *columns) if fits else [kind(*row) for row in zip(*columns, strict=True)]


def outlines_from_table(table: pa.Table) -> list[StoredOutline]:
    """Of the examples in a table of `EXAMPLE_SCHEMA`, or of `OUTLINE_SCHEMA` alone.

    Raises:
        ValueError: the table has other columns, or what is in them is no example.
    """
    batches = _columns(table, OUTLINE_SCHEMA).to_batches()
    return [outline for batch in batches for outline in _outlines(batch)]


def _outlines(batch: pa.RecordBatch) -> list[StoredOutline]:
    masks, streams = arrays_of(batch["loss_mask"]), _streams_of(batch["streams"])
    lengths = lengths_of(batch["loss_mask"])
    columns = [
        *(_scalars(batch[name], name) for name in ("id", "unit", "role")),
        lengths.tolist(),
        list(map(count_targets, masks)),
        [{name: values.shape for name, values in own.items()} for own in streams],
        [{name: float(v[0]) for name, v in own.items() if v.shape == (1,)} for own in streams],
    ]
    return _records(StoredOutline, columns, fits=_streams_fit(batch["streams"], lengths))


def token_ids_from_table(table: pa.Table) -> list[TokenIds]:
    """Of the rows of a table that has the column, read-only views of it.

    Raises:
        ValueError: it has not, or of another type.
    """
    batches = _columns(table, pa.schema([EXAMPLE_SCHEMA.field("token_ids")])).to_batches()
    return [token_ids for batch in batches for token_ids in arrays_of(batch["token_ids"])]


def _streams_of(column: pa.MapArray) -> list[dict[str, Numbers]]:
    """The streams of each row."""
    entries = elements_of(column)
    stored = entries.field(1)
    values, widths = arrays_of(stored.field("values")), numbers_of(stored.field("width"))
    if widths.any():
        values = [
            flat.reshape(-1, width) if width else flat
            for flat, width in zip(values, widths.tolist(), strict=True)
        ]
    named = zip(entries.field(0).to_pylist(), values, strict=True)
    return [dict(itertools.islice(named, count)) for count in lengths_of(column).tolist()]


def _scalars(array: pa.Array, name: str) -> list[Any]:
    """
    Raises:
        ValueError: one is null.
    """
    if array.null_count:
        raise ValueError(f"{array.null_count} values of the column {name} are null: {_MEND}")
    values: list[Any] = array.to_pylist()
    return values


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
    selected = table.select(schema.names)
    if selected.schema.equals(schema):
        return selected
    try:
        return selected.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"a column has another type ({error}): {_MEND}") from error
