"""An engine's memory on the host: what its processes share must not outlive them, at work they keep what they free, and
asleep they keep little."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
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


def keep_freed_memory(settings: str) -> str:
    """Settings (MALLOC_CONF) with which jemalloc keeps large blocks for a while after they were freed, as all others.

    As it is it gives those of 8 MiB back to the kernel at once, so that every tensor of a large step is faulted in
    anew, which takes half as long again as to compute it. It takes `heed_settings` as well.

    Args:
        settings: there are already; they come first.
    """
    return settings if "oversize_threshold" in settings else f"oversize_threshold:0,{settings}".rstrip(",")


def heed_settings() -> None:
    """What jemalloc was told of large blocks shall be so for the main thread too; nothing happens without jemalloc.

    Version 5.3 makes the first arena, that thread's, before it reads the settings, and never looks at it again.
    """
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is None:
        return
    threshold = ctypes.c_size_t()
    size = ctypes.c_size_t(ctypes.sizeof(threshold))
    mallctl(b"opt.oversize_threshold", ctypes.byref(threshold), ctypes.byref(size), None, ctypes.c_size_t())
    if threshold.value == 0:  # no block is too large
        threshold.value = sys.maxsize
    mallctl(b"arena.0.oversize_threshold", None, None, ctypes.byref(threshold), size)


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
