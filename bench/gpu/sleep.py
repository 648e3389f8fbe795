"""Engine and learner take turns with one GPU's memory: what each gives back, how long that takes, what stays right.

The sequence is that of a run: engine awake, engine asleep, learner trains, learner rests, push wakes the engine.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from actors.weight_transfer import Transport
from bench.gpu.engine import Reference, distance
from bench.gpu.hosted import HostedEngine, engine_options, hosted
from bench.gpu.learner import GIB, make_learner
from bench.gpu.models import random_examples, random_model
from bench.gpu.push import sender
from bench.gpu.rows import Row, Size, at_most
from bench.memory import anonymous, tree
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll

LEARNER = LearnerConfig(dtype="bfloat16", zero_stage=2, learning_rate=1e-5)


def run(device: str, scratch: Path) -> list[Row]:
    """Twice around, so that the second M-step starts from a learner that had rested."""
    size: Size = "0.6b" if device == "cuda" else "tiny"
    transport: Transport = "ipc" if device == "cuda" else "shared_memory"
    used, push = partial(used_on, device), partial(push_by, transport)
    model = random_model(scratch / "model", size, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    before = used()
    options = engine_options(
        model, device, dtype="bfloat16", gpu_memory_utilization=0.7, weight_transport=transport, sleeps=True
    )
    with hosted(options) as host:
        rows = [Row("sleep: engine awake (0.7 of a GPU)", (used() - before) / GIB, "GiB")]
        rows += timed("sleep: engine falls asleep", lambda: host.run(host.engine.sleep(120.0)))
        rows.append(Row("sleep: engine asleep", (used() - before) / GIB, "GiB"))
        learner = make_learner(LEARNER, model)
        rested = []
        for turn in (1, 2):
            rested.append(train(learner, size, turn))
            rows.append(Row(f"sleep, turn {turn}: learner after training", (used() - before) / GIB, "GiB"))
            rows += timed(f"sleep, turn {turn}: learner rests", learner.rest)
            rows.append(Row(f"sleep, turn {turn}: learner at rest", (used() - before) / GIB, "GiB"))
            rows += timed(
                f"sleep, turn {turn}: push, which wakes the engine", partial(push, learner, host, turn)
            )
            rows.append(Row(f"sleep, turn {turn}: engine awake again", (used() - before) / GIB, "GiB"))
            rows.append(served_as_exported(learner, host, size, scratch / f"exported-{turn}", turn))
            rows += timed(
                f"sleep, turn {turn}: engine falls asleep", lambda: host.run(host.engine.sleep(120.0))
            )
        learner.shutdown()
    # In a process of its own: a process group is for life.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        alone = pool.submit(train_alone, model, size).result()
    worst = max(abs(a - b) for a, b in zip(alone, itertools.chain(*rested), strict=True))
    return [
        *rows,
        at_most("sleep: loss of a learner that rested against one that did not", worst, "nats", 0.01),
    ]


def train_alone(model: Path, size: Size) -> list[float]:
    """The losses of both turns of a learner that never rests."""
    learner = make_learner(LEARNER, model)
    return [loss for turn in (1, 2) for loss in train(learner, size, turn)]


def train(learner, size: Size, turn: int) -> list[float]:  # type: ignore[no-untyped-def]
    count = 8 if size == "tiny" else 64
    examples = random_examples(size, count=count, shortest=500, longest=1500)
    return [step["loss"] for step in learner.train(examples, WeightedNll(), phase_seed=turn).history]


def push_by(transport: Transport, learner, host: HostedEngine, version: int) -> None:  # type: ignore[no-untyped-def]
    sender(learner, host, transport).push(version)


def served_as_exported(learner, host: HostedEngine, size: Size, directory: Path, turn: int) -> Row:  # type: ignore[no-untyped-def]
    learner.export(directory)
    ids = random_examples(size, count=1, shortest=64, longest=64)[0].token_ids.tolist()
    served = host.run(host.engine.token_logprobs(ids, 1))
    worst = distance(served, Reference(directory).logprobs(ids, 1))
    return at_most(f"sleep, turn {turn}: served against exported, log-probability", worst, "nats", 0.5)


def timed(what: str, work: Callable[[], object]) -> list[Row]:
    start = time.perf_counter()
    work()
    return [Row(what, time.perf_counter() - start, "s")]


def used_on(device: str) -> int:
    """Bytes of the GPU in use, by anyone; on a CPU those that this process and its descendants hold themselves."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    return sum(map(anonymous, tree(os.getpid())))
