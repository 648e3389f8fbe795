"""Engine and learner take turns with one GPU's memory: what each gives back, how long that takes, what stays right.

The sequence is that of a run: engine awake, engine asleep, learner trains, learner rests, push wakes the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu.engine import Reference, distance
from bench.gpu.hosted import HostedEngine, engine_options, hosted
from bench.gpu.learner import GIB, make_learner
from bench.gpu.models import random_examples, random_model
from bench.gpu.push import sender
from bench.gpu.rows import Row, Size, at_most
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll


def run(device: str, scratch: Path) -> list[Row]:
    """Twice around, so that the second M-step starts from a learner that had rested."""
    if device == "cpu":
        return [Row("sleep: vLLM has none on CPUs", 0, "")]
    size: Size = "0.6b"
    model = random_model(scratch / "model", size, device)
    torch.cuda.empty_cache()
    before = used()
    options = engine_options(
        model, device, dtype="bfloat16", gpu_memory_utilization=0.7, weight_transport="ipc", sleeps=True
    )
    with hosted(options) as host:
        rows = [Row("sleep: engine of 0.7 of the GPU, awake", (used() - before) / GIB, "GiB")]
        rows += timed("sleep: engine falls asleep", lambda: host.run(host.engine.sleep(120.0)))
        rows.append(Row("sleep: engine asleep", (used() - before) / GIB, "GiB"))
        learner = make_learner(LearnerConfig(dtype="bfloat16", zero_stage=2, learning_rate=1e-5), model)
        undisturbed = []
        for turn in (1, 2):
            losses = train(learner, turn)
            undisturbed.append(losses)
            rows.append(Row(f"sleep, turn {turn}: learner after training", (used() - before) / GIB, "GiB"))
            rows += timed(f"sleep, turn {turn}: learner rests", learner.rest)
            rows.append(Row(f"sleep, turn {turn}: learner at rest", (used() - before) / GIB, "GiB"))
            rows += timed(
                f"sleep, turn {turn}: push, which wakes the engine", partial(push, learner, host, turn)
            )
            rows.append(Row(f"sleep, turn {turn}: engine awake again", (used() - before) / GIB, "GiB"))
            rows.append(served_as_exported(learner, host, scratch / f"exported-{turn}", turn))
            rows += timed(
                f"sleep, turn {turn}: engine falls asleep", lambda: host.run(host.engine.sleep(120.0))
            )
        learner.shutdown()
    alone = make_learner(LearnerConfig(dtype="bfloat16", zero_stage=2, learning_rate=1e-5), model)
    worst = max(
        abs(a - b) for turn in (1, 2) for a, b in zip(train(alone, turn), undisturbed[turn - 1], strict=True)
    )
    alone.shutdown()
    return [
        *rows,
        at_most("sleep: loss of a learner that rested against one that did not", worst, "nats", 0.01),
    ]


def train(learner, turn: int) -> list[float]:  # type: ignore[no-untyped-def]
    examples = random_examples("0.6b", count=64, shortest=500, longest=1500)
    return [step["loss"] for step in learner.train(examples, WeightedNll(), phase_seed=turn).history]


def push(learner, host: HostedEngine, version: int) -> None:  # type: ignore[no-untyped-def]
    sender(learner, host, "ipc").push(version)


def served_as_exported(learner, host: HostedEngine, directory: Path, turn: int) -> Row:  # type: ignore[no-untyped-def]
    learner.export(directory)
    ids = random_examples("0.6b", count=1, shortest=64, longest=64)[0].token_ids.tolist()
    served = host.run(host.engine.token_logprobs(ids, 1))
    worst = distance(served, Reference(directory).logprobs(ids, 1))
    return at_most(f"sleep, turn {turn}: served against exported, log-probability", worst, "nats", 0.5)


def timed(what: str, work: Callable[[], object]) -> list[Row]:
    start = time.perf_counter()
    work()
    return [Row(what, time.perf_counter() - start, "s")]


def used() -> int:
    """Bytes of the device in use, by anyone."""
    free, total = torch.cuda.mem_get_info()
    return total - free
