"""List columns of Arrow tables as NumPy arrays, and back: the buffers as a whole, never an object per element."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


def list_array(
    arrays: Sequence[Array | None], element: pa.DataType, offsets: pa.Array | None = None
) -> pa.ListArray:
    """One list per array, null for None. `offsets` are those of the arrays' lengths, where they are known already."""
    given = [array for array in arrays if array is not None]
    if len(given) == len(arrays):
        is_null, lengths = None, map(len, given)
    else:
        is_null = pa.array([array is None for array in arrays], pa.bool_())
        lengths = map(len, (() if array is None else array for array in arrays))
    # The lengths first: once the elements are copied, little of the arrays is in the processor's cache.
    offsets = offsets_of(lengths) if offsets is None else offsets
    values = _packed(np.concatenate(given) if given else np.zeros(0, element.to_pandas_dtype()), element)
    return pa.ListArray.from_arrays(offsets, values, mask=is_null)


def offsets_of(lengths: Iterable[int]) -> pa.Array:
    """Where the lists of these lengths begin among all elements, and where the last one ends."""
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def arrays_of(lists: pa.ListArray) -> list[Array]:
    """The lists, read-only views of their buffer; booleans, which Arrow packs, are copied at once.

    Raises:
        ValueError: a list is null, or an element that is no floating-point number (such a one is NaN).
    """
    if lists.null_count:
        raise ValueError(f"{lists.null_count} lists of type {lists.type} are null")
    return _views(lists)


def optional_arrays_of(lists: pa.ListArray) -> list[Array | None]:
    """As `arrays_of`, None for a null list."""
    is_valid = lists.is_valid().to_pylist() if lists.null_count else itertools.repeat(True)
    return [view if valid else None for view, valid in zip(_views(lists), is_valid, strict=False)]


def lengths_of(lists: pa.ListArray | pa.MapArray) -> npt.NDArray[np.int32]:
    """Elements of each list."""
    lengths: npt.NDArray[np.int32] = np.diff(_offsets(lists))
    return lengths


def elements_of(lists: pa.ListArray | pa.MapArray) -> pa.Array:
    """Those of these lists, end to end: a slice has no others. Of a map they are its entries."""
    offsets = _offsets(lists)
    return lists.values.slice(offsets[0], offsets[-1] - offsets[0])


def numbers_of(array: pa.Array) -> Array:
    """An array that is no list, as NumPy's: a view, but for booleans.

    Raises:
        ValueError: an element is null and no floating-point number (such a one is NaN).
    """
    if array.null_count and not pa.types.is_floating(array.type):
        raise ValueError(f"{array.null_count} elements of type {array.type} are null")
    return _unpacked(array) if pa.types.is_boolean(array.type) else array.to_numpy(zero_copy_only=False)


def _views(lists: pa.ListArray) -> list[Array]:
    elements, offsets = elements_of(lists), _offsets(lists)
    if elements.null_count and not pa.types.is_floating(elements.type):
        raise ValueError(f"{elements.null_count} elements of lists of type {lists.type} are null")
    flat = numbers_of(elements)
    return [flat[start:end] for start, end in itertools.pairwise((offsets - offsets[0]).tolist())]


def _offsets(lists: pa.ListArray | pa.MapArray) -> npt.NDArray[np.int32]:
    """Where each list begins in the buffer, and where the last one ends."""
    # An array without lists may come without offsets.
    offsets: npt.NDArray[np.int32] = lists.offsets.to_numpy() if len(lists) else np.zeros(1, np.int32)
    return offsets


def _packed(flat: Array, element: pa.DataType) -> pa.Array:
    """Booleans are packed here: Arrow takes twenty times as long, one after the other."""
    if not pa.types.is_boolean(element):
        return pa.array(flat, element)
    bits = pa.py_buffer(np.packbits(flat, bitorder="little"))
    return pa.Array.from_buffers(element, len(flat), [None, bits])


def _unpacked(flags: pa.BooleanArray) -> npt.NDArray[np.bool_]:
    if not len(flags):
        return np.zeros(0, np.bool_)
    byte, bit = divmod(flags.offset, 8)
    packed = np.frombuffer(flags.buffers()[1], np.uint8)[byte:]
    unpacked = np.unpackbits(packed, count=bit + len(flags), bitorder="little")
    return unpacked[bit:].view(np.bool_)
