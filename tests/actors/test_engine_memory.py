"""Memory that is given back while its tensors stay, and shared memory that nobody can find any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from actors.engine_memory import drop_contents, remove_names

SIZE = 64 << 20


def resident() -> int:
    return psutil.Process(os.getpid()).memory_info().rss


def test_what_tensors_held_is_free_and_reads_as_zeros_until_it_is_filled_again() -> None:
    tensor = torch.full((SIZE // 4,), 7.0)
    held = resident()

    drop_contents([tensor[100:], torch.empty(0), torch.ones(3)])

    assert resident() < held - 0.9 * SIZE
    assert tensor[SIZE // 8] == 0
    tensor.fill_(3.0)
    assert tensor.min() == 3


def test_nothing_beside_a_tensor_is_touched() -> None:
    """Small tensors share pages with others."""
    tensors = [torch.full((n,), float(n)) for n in range(1, 3000, 7)]

    drop_contents(tensors[::2])

    for tensor in tensors[1::2]:
        assert (tensor == len(tensor)).all()


def test_the_shared_memory_of_descendants_loses_its_names_and_stays() -> None:
    code = (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "memory = SharedMemory(create=True, size=4096)\n"
        "memory.buf[0] = 7\n"
        "print(memory.name, flush=True)\n"
        "input()\n"
        "print(memory.buf[0])\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        segment = Path("/dev/shm") / process.stdout.readline().strip()
        assert segment.exists()

        remove_names()

        assert not segment.exists()
        assert process.communicate("\n")[0].strip() == "7"
