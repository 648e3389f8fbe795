"""What the device itself can do: the limits that other parts are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu.rows import Row

RUNS = 7


def run(device: str, scratch: Path) -> list[Row]:
    """Memory copy and bfloat16 matrix product."""
    return [Row("memory copy, read + written", copy_rate(device) / 1e9, "GB/s"),
            Row("bfloat16 matrix product", matmul_rate(device) / 1e12, "TFLOP/s")]  # fmt: skip


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str) -> float:
    """FLOP/s of a large square product of random matrices."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)


def seconds(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Median time of one call, over several runs of `repeats` calls; the first run does not count."""
    times = []
    for _ in range(RUNS + 1):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronise(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
