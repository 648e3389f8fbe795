"""What this machine, or the container that the process runs in, has free."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def total_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that there are: of the machine, or of the container if that has less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
    except OSError:  # no container, or one of the first version of control groups
        return total
    return total if limit == "max" else min(total, int(limit))


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that can be taken without swapping: of the machine, or of the container if that has less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), (cgroup / "memory.current").read_text()
    except OSError:  # no container, or one of the first version of control groups
        return available
    if limit == "max":
        return available
    # The page cache counts as used, but gives way.
    statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    cached = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file"))
    return min(available, max(0, int(limit) - int(used) + cached))


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: those that it is bound to, or the container's quota if that is less."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):  # no container, or one of the first version of control groups
        return bound
    return bound if quota == "max" else min(bound, max(1, math.ceil(int(quota) / int(period))))


def share_of_cores(cores: int, processes: int, *, kept: int = 0) -> int:
    """Threads of each of so many processes that divide the cores of a machine among them, at least one.

    Args:
        kept: cores that are left to others.
    """
    return max(1, (cores - kept) // processes)


def release_freed_memory() -> None:
    """Give back to the machine what was freed: glibc keeps small pieces, such as the cells of an inverted file."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
