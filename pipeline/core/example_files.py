"""Parquet files of training examples: what is known of all of them at little cost, and chosen ones in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.record_tables import (
    EXAMPLE_SCHEMA,
    OUTLINE_SCHEMA,
    examples_from_table,
    outlines_from_table,
    require_columns,
)
from pipeline.core.records import Example, StoredOutline


def read_outlines(shard: Path) -> list[StoredOutline]:
    """Of all examples of a shard; their token ids are not read.

    Raises:
        UserError: it holds something else.
    """
    with _told_of(shard), pq.ParquetFile(shard) as file:
        require_columns(file.schema_arrow.names, EXAMPLE_SCHEMA)
        return outlines_from_table(file.read(OUTLINE_SCHEMA.names))


def read_examples(shard: Path, rows: npt.NDArray[np.int64] | None = None) -> list[Example]:
    """Those of these rows, or all of a shard. They hold on to no more of it than themselves.

    Raises:
        UserError: it holds something else.
    """
    with _told_of(shard), pq.ParquetFile(shard) as file:
        table = file.read(EXAMPLE_SCHEMA.names)
        return examples_from_table(table if rows is None else table.take(rows))


@contextmanager
def _told_of(shard: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{shard} holds no training examples: {error}") from error
