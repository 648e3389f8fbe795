"""Which pages of a file are in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def resident(path: Path) -> float:
    """Share of the file's pages that are in memory."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as pages:
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states
        )
        del first  # lets the mapping go
    assert not failed
    return sum(state & 1 for state in states) / len(states)


def cool(index: Path) -> list[Path]:
    """Take the files below out of memory, as if the machine had just started; the largest comes first."""
    files = sorted(
        (path for path in index.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size
    )
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if any(map(resident, files)):
        pytest.skip(f"the file system of {index} keeps what was written in memory")
    return files
