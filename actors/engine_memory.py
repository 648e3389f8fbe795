"""An engine's memory on the host: what its processes share must not outlive them, and asleep they keep little."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_NAMES = "/dev/shm/psm_"  # what Python's `multiprocessing.shared_memory` calls its segments


def remove_names() -> None:
    """Remove the names of the segments that descendants of this process have mapped.

    The memory stays as long as one of them lives. Engines of several workers have such segments, and nobody would
    remove their names after such an engine is killed. Call it when all have what they need.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for mapping in process.memory_maps():
                if mapping.path.startswith(_NAMES):
                    Path(mapping.path).unlink(missing_ok=True)


def drop_contents(tensors: Iterable[torch.Tensor]) -> None:
    """Give the pages of CPU tensors back to the kernel. The tensors stay: they read as zeros, and can be filled again.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (storage.data_ptr() + storage.nbytes() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0 and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
            error = ctypes.get_errno()
            raise OSError(error, f"madvise: {os.strerror(error)}")
