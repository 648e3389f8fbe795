"""Parquet files of trajectories and examples, and their side-cars: read only as far as a page needs them.

What is known of a file is kept by its path, time and size, so that one that was written anew is read anew: of all files
their number of rows and the checksums of their questions, the rest of the few that were looked at last.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.run import Json, read_json

_FILES, _FEW = 1 << 16, 8
_Stamp = tuple[int, int]


class NoSuchPage(LookupError):
    """There is no page of that name, or not any more."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file comes out with its name.

    Raises:
        NoSuchPage: it is not there, or not any more.
        UserError: it is damaged, or of another version.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise NoSuchPage(f"{path} is not there (any more)") from error
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error!s:.200})") from error


@dataclass(frozen=True, slots=True)
class Footer:
    """What a file says of itself. `starts`: of each row group the first row, and the number of all rows."""

    metadata: pq.FileMetaData
    columns: frozenset[str]
    starts: npt.NDArray[np.int64]
    _bounds: dict[str, tuple[str, str] | None] = field(default_factory=dict)

    def bounds(self, leaf: str) -> tuple[str, str] | None:
        """Between which texts all of a leaf ("steps.list.element.action") are; None if the file does not say, or there
        are none."""
        if leaf not in self._bounds:
            self._bounds[leaf] = self._between(leaf)
        return self._bounds[leaf]

    def _between(self, leaf: str) -> tuple[str, str] | None:
        found = []
        schema = self.metadata.schema
        (column,) = [number for number in range(len(schema)) if schema.column(number).path == leaf]
        for group in range(self.metadata.num_row_groups):
            told = self.metadata.row_group(group).column(column).statistics
            if told is None or (told.num_values and not told.has_min_max):
                return None
            found += [told.min, told.max] if told.has_min_max else []
        return (min(found), max(found)) if found else None


@dataclass(frozen=True, slots=True)
class Questions:
    """Those of a file, in its order; the rows of each are beside each other. `starts`: of each the first row, and the
    number of all rows."""

    ids: pa.StringArray
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


def num_rows(path: Path) -> int:
    """
    Raises:
        NoSuchPage, UserError: as `reading`.
    """
    with reading(path):
        return _num_rows(path, _stamp(path))


def footer(path: Path) -> Footer:
    """
    Raises:
        NoSuchPage, UserError: as `reading`.
    """
    with reading(path):
        return _footer(path, _stamp(path))


def read_rows(path: Path, first: int, end: int, columns: Sequence[str]) -> pa.Table:
    """Rows `first` to `end`; read are the row groups that have some of them. Columns may be leaves
    ("steps.list.element.action").

    Raises:
        NoSuchPage, UserError: as `reading`.
    """
    known = footer(path)
    begin, stop = np.searchsorted(known.starts, [first, end - 1], side="right").tolist()
    with reading(path), pq.ParquetFile(path, metadata=known.metadata) as file:
        table = file.read_row_groups(range(begin - 1, stop), columns=list(columns), use_threads=False)
    return table.slice(first - int(known.starts[begin - 1]), end - first).combine_chunks()


def questions_in(path: Path) -> Questions:
    """
    Raises:
        NoSuchPage, UserError: as `reading`.
    """
    with reading(path):
        return _questions(path, _stamp(path))


def marks_of(path: Path) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Of each question of a file the checksum (CRC-32) of its id, and of its words, -1 where the file has none.

    Raises:
        NoSuchPage, UserError: as `reading`.
    """
    with reading(path):
        return _marks(path, _stamp(path))


def tasks_in(side_car: Path) -> dict[str, Json]:
    """By question what a side-car says; empty if it is not there.

    Raises:
        UserError: it is damaged.
    """
    try:
        stamp = _stamp(side_car)
    except FileNotFoundError:
        return {}
    return _tasks(side_car, stamp)


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(_FILES)
def _num_rows(path: Path, stamp: _Stamp) -> int:
    return int(pq.read_metadata(path).num_rows)


@lru_cache(_FEW)
def _footer(path: Path, stamp: _Stamp) -> Footer:
    metadata = pq.read_metadata(path)
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return Footer(
        metadata, frozenset(metadata.schema.to_arrow_schema().names), np.cumsum([0, *lengths], dtype=np.int64)
    )


@lru_cache(_FEW)
def _questions(path: Path, stamp: _Stamp) -> Questions:
    ids = _column(path, "question_id")
    starts = _starts(ids)
    return Questions(ids.take(pa.array(starts[:-1])), starts)


@lru_cache(_FILES)
def _marks(path: Path, stamp: _Stamp) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    ids = _column(path, "question_id")
    first = pa.array(_starts(ids)[:-1])
    marks = [zlib.crc32(id_.encode()) for id_ in ids.take(first).to_pylist()]
    words = np.full(len(marks), -1, np.int64)
    if "question" in pq.read_schema(path).names:
        words[:] = [checksum(text) for text in _column(path, "question").take(first).to_pylist()]
    return np.array(marks, np.uint32), words


@lru_cache(_FEW)
def _tasks(path: Path, stamp: _Stamp) -> dict[str, Json]:
    return {task["id"]: task for task in (read_json(path) or {}).get("tasks", [])}


def checksum(words: str | None) -> int:
    """CRC-32; -1 of nothing."""
    return zlib.crc32(words.encode()) if words else -1


def _column(path: Path, name: str) -> Any:
    with pq.ParquetFile(path) as file:
        return file.read(columns=[name], use_threads=False).column(name).combine_chunks()


def _starts(ids: Any) -> npt.NDArray[np.int64]:
    """Where a run of equal ones begins, and where the last one ends."""
    ends = pc.run_end_encode(ids, run_end_type=pa.int64()).run_ends.to_numpy() if len(ids) else []
    return np.array([0, *ends], np.int64)
