"""What the memory of a process and its descendants is, for every benchmark: anonymous resident memory (RssAnon).

It is what the processes themselves hold. Pages of files, such as those of libraries and of memory-mapped weights and
indexes, are left out: processes share them, and the kernel takes them back. The unique set size (USS, of psutil), the
other candidate, counts those pages as long as one process alone has them mapped, and takes a walk over all mappings
under the lock that allocations need; this is one line of one file, and can be read many times a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from re import Pattern


def tree(pid: int) -> list[int]:
    """A process and its descendants, as far as they live.

    Not those with their parent's command line: they are about to start another program, and until then the parent's
    memory is counted as theirs too.
    """
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    command = _read(pid, "cmdline")
    children = [int(child) for task in tasks for child in _read(pid, f"task/{task.name}/children").split()]
    return [pid, *(one for child in children if _read(child, "cmdline") != command for one in tree(child))]


def anonymous(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    lines = _read(pid, "status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def by_kind(pid: int, kinds: Mapping[str, Pattern[str]]) -> Counter[str]:
    """Bytes of a process and its descendants by kind, the first whose pattern is in the command line or title."""
    found = Counter[str]()
    for process in tree(pid):
        command = _read(process, "cmdline").replace("\0", " ").rstrip()
        kind = next((kind for kind, pattern in kinds.items() if pattern.search(command)), None)
        if kind is not None:
            found[kind] += anonymous(process)
    return found


def _read(pid: int, name: str) -> str:
    """A file of that process in /proc; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
