"""Parquet files of training examples: what is known of all of them at little cost, and chosen ones in full."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.prefixes import Overlap, overlaps_of
from pipeline.core.record_tables import (
    EXAMPLE_SCHEMA,
    OUTLINE_SCHEMA,
    examples_from_table,
    outlines_from_table,
    require_columns,
    token_ids_from_table,
)
from pipeline.core.records import Example, Outline, StoredOutline, TokenIds

ROWS_AT_ONCE = 64
"""Of a shard, however many it has: to read rows takes several times the memory that they have afterwards."""

_WITH_TOKENS = OUTLINE_SCHEMA.append(EXAMPLE_SCHEMA.field("token_ids"))

BUFFER_BYTES = 256 << 10
"""Of the file, for each column."""


def read_outlines(shard: Path) -> list[StoredOutline]:
    """Of all examples of a shard; their token ids are not read.

    Raises:
        UserError: it holds something else.
    """
    with _told_of(shard):
        return [one for _, table in _tables(shard, OUTLINE_SCHEMA) for one in outlines_from_table(table)]


def read_outlines_and_overlaps(
    shard: Path, *, by_role: bool = False
) -> tuple[list[StoredOutline], list[Overlap]]:
    """Of all examples of a shard, in one pass: the second says what each begins with in common with others of its unit.

    Args:
        by_role: those of another role are no others of it, as they never share a row (a joint loss).

    Raises:
        UserError: it holds something else.
    """
    outlines: list[StoredOutline] = []
    token_ids: list[TokenIds] = []
    with _told_of(shard):
        for _, table in _tables(shard, _WITH_TOKENS):
            outlines += outlines_from_table(table)
            token_ids += token_ids_from_table(table)
        return outlines, overlaps_of([unit_of(outline, by_role) for outline in outlines], token_ids)


def unit_of(outline: Outline, by_role: bool) -> Hashable:
    """What is equal for the examples of a unit; with `by_role`, of a unit and a role."""
    return (outline.role, outline.unit) if by_role else outline.unit


def read_examples(shard: Path, rows: npt.NDArray[np.int64] | None = None) -> list[Example]:
    """All of a shard, or those of these rows, which ascend. They hold no memory of the others.

    Raises:
        UserError: it holds something else.
    """
    found: list[Example] = []
    with _told_of(shard):
        for first, table in _tables(shard, EXAMPLE_SCHEMA):
            if rows is not None:
                start, end = np.searchsorted(rows, (first, first + len(table)))
                table = table.take(rows[start:end] - first)
            found += examples_from_table(table)
    return found


def _tables(shard: Path, schema: pa.Schema) -> Iterator[tuple[int, pa.Table]]:
    """These columns of a shard, some rows after the other, with the number of the first of them."""
    with pq.ParquetFile(shard, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        require_columns(file.schema_arrow.names, EXAMPLE_SCHEMA)
        first = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names):
            yield first, pa.Table.from_batches([batch])
            first += len(batch)


@contextmanager
def _told_of(shard: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{shard} holds no training examples: {error!s:.300}") from error
