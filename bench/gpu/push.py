"""Push of weights from a learner to an engine on the same device: checksums, speed, and what is served afterwards."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from actors.weight_transfer import SharedMemorySender, Transport, VllmSender, WeightSender
from bench.gpu.engine import Reference, distance
from bench.gpu.hosted import HostedEngine, engine_options, hosted
from bench.gpu.learner import make_learner
from bench.gpu.limits import copy_rate, seconds
from bench.gpu.models import random_examples, random_model
from bench.gpu.rows import Row, Size, at_most
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.likelihood import WeightedNll

PUSHES = 4


def run(device: str, scratch: Path) -> list[Row]:
    size: Size = "0.6b" if device == "cuda" else "tiny"
    model = random_model(scratch / "model", size, device)
    learner = make_learner(
        LearnerConfig(dtype="bfloat16", zero_stage=2, batch_size=4, learning_rate=1e-3, warmup_ratio=0.0),
        model,
    )
    rows = []
    for transport, limit, what in ways(device):
        options = engine_options(model, device, dtype="bfloat16", weight_transport=transport)
        with on_gpu(1 if transport == "nccl" else 0), hosted(options) as host:
            rates, nbytes = [], 0
            for version in range(1, (PUSHES if device == "cuda" else 2) + 1):
                few = random_examples(size, count=4, shortest=100, longest=200)
                learner.train(few, WeightedNll(), phase_seed=version)
                # A push that another digest came of, or that left weights unsent, raises.
                report = sender(learner, host, transport).push(version)
                assert report is not None
                nbytes = report.nbytes
                rates.append(nbytes / report.seconds)
            name = f"push, {transport}, {nbytes / 1e9:.2f} GB, checksummed on both sides"
            rate = statistics.median(rates[1:])
            rows += [
                Row(f"{name}: first, with the meeting", rates[0] / 1e9, "GB/s"),
                Row(name, rate / 1e9, "GB/s"),
                Row(f"{name}: of {what} ({limit / 1e9:.0f} GB/s)", 100 * rate / limit, "%"),
            ]
            learner.export(scratch / "exported")
            reference = Reference(scratch / "exported")
            ids = random_examples(size, count=1, shortest=64, longest=64)[0].token_ids.tolist()
            served = host.run(host.engine.token_logprobs(ids, 1))
            worst = distance(served, reference.logprobs(ids, 1))
            rows.append(
                at_most(f"push, {transport}: served against exported, log-probability", worst, "nats", 0.5)
            )
    learner.shutdown()
    if device == "cuda" and torch.cuda.device_count() < 2:
        rows.append(Row("push, nccl: needs two GPUs, not run", 0, ""))
    return rows


def ways(device: str) -> list[tuple[Transport, float, str]]:
    """The transports that can be tried here, each with what limits it: bytes a second, and its name."""
    if device == "cpu":
        return [("shared_memory", copy_rate("cpu") / 2, "a memory copy")]
    found: list[tuple[Transport, float, str]] = [
        ("ipc", copy_rate("cuda") / 2, "a copy within the GPU"),
        ("shared_memory", transfer_rate("cuda:0", "cpu"), "a copy to the host"),
    ]
    if torch.cuda.device_count() > 1:
        found.append(("nccl", transfer_rate("cuda:0", "cuda:1"), "a copy to the other GPU"))
    return found


def transfer_rate(source: str, target: str) -> float:
    """Bytes per second of a copy from one device's memory to another's."""
    data = torch.empty(1 << 30, dtype=torch.uint8, device=source)
    there = torch.empty(1 << 30, dtype=torch.uint8, device=target, pin_memory=target == "cpu")
    return data.numel() / seconds(lambda: there.copy_(data), "cuda", repeats=3)


@contextmanager
def on_gpu(number: int) -> Iterator[None]:
    """Processes that are started meanwhile see that GPU only."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else [str(gpu) for gpu in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def sender(learner, host: HostedEngine, transport: Transport) -> WeightSender:  # type: ignore[no-untyped-def]
    """As `actors.learner.LearnerRank.push` makes it."""
    if transport == "shared_memory":
        return SharedMemorySender(host, learner.named_weights, deadline_s=120)
    return VllmSender(
        transport,
        host,
        learner.named_weights,
        rank=0,
        deadline_s=120,
        largest_tensor_bytes=learner.largest_tensor_bytes(),
    )
