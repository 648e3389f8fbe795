"""List columns of Arrow tables as NumPy arrays, and back: the buffers as a whole, never an object per element."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


def list_array(arrays: Sequence[Array | None], element: pa.DataType) -> pa.ListArray:
    """One list per array, null for None."""
    given = [array for array in arrays if array is not None]
    values = pa.array(np.concatenate(given) if given else [], element)
    is_null = pa.array([array is None for array in arrays], pa.bool_())
    lengths = [0 if array is None else len(array) for array in arrays]
    return pa.ListArray.from_arrays(offsets_of(lengths), values, mask=is_null)


def offsets_of(lengths: Sequence[int]) -> pa.Array:
    """Where the lists of these lengths begin among all elements, and where the last one ends."""
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def arrays_of(column: pa.ChunkedArray) -> list[Array]:
    """The lists of a column, read-only views of its buffers; booleans, which Arrow packs, are copied at once.

    Raises:
        ValueError: a list is null, or an element that is no floating-point number (such a one is NaN).
    """
    found = [array for array in optional_arrays_of(column) if array is not None]
    if len(found) != len(column):
        raise ValueError(f"{len(column) - len(found)} lists of type {column.type} are null")
    return found


def optional_arrays_of(column: pa.ChunkedArray) -> list[Array | None]:
    """As `arrays_of`, None for a null list."""
    return [array for chunk in column.chunks for array in _views(chunk)]


def entries_of(column: pa.ChunkedArray) -> Iterator[tuple[list[int], pa.StructArray]]:
    """Of each chunk of a map column: where the entries of each row begin and end, and these entries."""
    return (_elements(chunk) for chunk in column.chunks)


def _views(lists: pa.ListArray) -> Iterator[Array | None]:
    offsets, elements = _elements(lists)
    if elements.null_count and not pa.types.is_floating(elements.type):
        raise ValueError(f"{elements.null_count} elements of lists of type {lists.type} are null")
    flat = elements.to_numpy(zero_copy_only=False)
    views: Iterator[Array] = (flat[start:end] for start, end in itertools.pairwise(offsets))
    if not lists.null_count:
        return views
    is_valid = lists.is_valid().to_pylist()
    return (view if valid else None for view, valid in zip(views, is_valid, strict=True))


def _elements(lists: pa.ListArray | pa.MapArray) -> tuple[list[int], pa.Array]:
    """Where each list begins and the last one ends, and the elements of these lists: a slice has no others."""
    if not len(lists):
        return [0], lists.values[:0]
    offsets = lists.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    return (offsets - first).tolist(), lists.values.slice(first, last - first)
