"""The shared memory between an engine's processes: it must not outlive them, however they end."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_NAMES = "/dev/shm/psm_"  # what Python's `multiprocessing.shared_memory` calls its segments


def remove_names() -> None:
    """Remove the names of the segments that descendants of this process have mapped.

    The memory stays as long as one of them lives. vLLM's engine on CPUs does not end by itself, and nobody would remove
    the names after it is killed. Call it when all have what they need.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for mapping in process.memory_maps():
                if mapping.path.startswith(_NAMES):
                    Path(mapping.path).unlink(missing_ok=True)
