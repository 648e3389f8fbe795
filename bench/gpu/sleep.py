"""What an engine gives back when it sleeps, how long that takes, and that it wakes with the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from actors import engine as actors_engine
from bench.gpu.hosted import engine_options, hosted
from bench.gpu.models import random_examples, random_model
from bench.gpu.rows import Row, Size, at_most

GIB = 2**30


def run(device: str, scratch: Path) -> list[Row]:
    """vLLM's levels: 1 moves the weights to the host's memory, 2 drops them. Both drop the KV cache."""
    if device == "cpu":
        return [Row("sleep: vLLM has none on CPUs", 0, "")]
    size: Size = "0.6b"
    model = random_model(scratch / "model", size, device)
    ids = random_examples(size, count=1, shortest=200, longest=200)[0].token_ids.tolist()
    torch.cuda.empty_cache()
    rows, before = [], used()
    plain = actors_engine._engine_args
    actors_engine._engine_args = lambda options: with_sleep(plain(options))
    with hosted(engine_options(model, device, dtype="bfloat16", gpu_memory_utilization=0.6)) as host:
        llm: Any = host.engine._llm
        awake = used() - before
        rows.append(Row("sleep: engine of 0.6 of the memory, awake", awake / GIB, "GiB"))
        scores = host.run(host.engine.token_logprobs(ids, 1))
        for level in (1, 2):
            start = time.perf_counter()
            host.run(llm.sleep(level))
            asleep, slept = used() - before, time.perf_counter()
            host.run(llm.wake_up())
            if level == 2:
                host.run(llm.collective_rpc("reload_weights"))
            rows += [
                Row(f"sleep, level {level}: still held", asleep / GIB, "GiB"),
                Row(f"sleep, level {level}: falling asleep", slept - start, "s"),
                Row(f"sleep, level {level}: waking up{' and reading the weights' if level == 2 else ''}",
                    time.perf_counter() - slept, "s"),
            ]  # fmt: skip
            host.run(llm.reset_prefix_cache())
            after = host.run(host.engine.token_logprobs(ids, 1))
            worst = max(abs(a - b) for a, b in zip(scores, after, strict=True))
            rows.append(at_most(f"sleep, level {level}: scores afterwards differ by", worst, "nats", 1e-3))
    actors_engine._engine_args = plain
    return rows


def with_sleep(arguments: Any) -> Any:
    arguments.enable_sleep_mode = True
    return arguments


def used() -> int:
    """Bytes of the device in use, by anyone."""
    free, total = torch.cuda.mem_get_info()
    return total - free
