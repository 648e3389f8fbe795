"""The memory of processes as the benchmarks count it, on real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.memory import anonymous, by_kind, tree

MIB = 2**20
HOLD = 64 * MIB
SAYS_READY = "print('ready', flush=True); sys.stdin.read()"


@contextmanager
def process(code: str, *arguments: str) -> Iterator[int]:
    """One that has run `code` and now waits."""
    command = [sys.executable, "-c", f"import subprocess, sys\n{code}\n{SAYS_READY}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child.pid
        child.communicate()


def test_what_a_process_holds_is_counted() -> None:
    with process(f"held = b'x' * {HOLD}") as pid:
        assert HOLD < anonymous(pid) < HOLD + 64 * MIB


def test_pages_of_a_mapped_file_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * HOLD)
    code = "import mmap; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])"

    with process(code, str(tmp_path / "file")) as pid:
        assert anonymous(pid) < HOLD


def test_descendants_are_counted_by_kind() -> None:
    child = f"import sys; held = b'x' * {HOLD}; {SAYS_READY}"
    code = (
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, 'the-child'], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE); child.stdout.readline()"
    )
    kinds = {"child": re.compile("the-child$"), "parent": re.compile("the-parent"), "none": re.compile("$^")}

    with process(code, "the-parent") as pid:
        assert pid in tree(os.getpid())
        assert len(tree(pid)) == 2
        found = by_kind(pid, kinds)

    assert found["child"] > HOLD > found["parent"] > 0
    assert "none" not in found


@pytest.mark.parametrize("read", [anonymous, lambda pid: len(tree(pid))])
def test_a_process_that_has_ended_has_none(read: object) -> None:
    with process("pass") as pid:
        pass

    assert callable(read) and read(pid) == 0
