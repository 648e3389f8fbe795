"""How actors on CPUs allocate: by jemalloc, which keeps what is freed for a while."""

from __future__ import annotations

import ctypes
import sys

SETTINGS = "background_thread:true,oversize_threshold:0"
"""For MALLOC_CONF. Memory goes back to the kernel some seconds after it was freed, also from a process that then does
nothing; and large blocks as all others. By its own choice jemalloc gives those of 8 MiB back at once, so that every
tensor of a large step is faulted in anew, which takes half as long again as to compute it. It takes `heed_settings` as
well.
"""


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
