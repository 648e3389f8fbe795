"""Push of weights from a learner to an engine on the same device: checksums, speed, and what is served afterwards."""

from __future__ import annotations

import statistics
from pathlib import Path

from actors.weight_transfer import SharedMemorySender, VllmSender, WeightSender
from bench.gpu.engine import Reference, distance
from bench.gpu.hosted import HostedEngine, engine_options, hosted
from bench.gpu.learner import make_learner
from bench.gpu.limits import copy_rate
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
    limit = copy_rate(device) / 2
    rows = []
    for transport in ("ipc", "shared_memory") if device == "cuda" else ("shared_memory",):
        with hosted(engine_options(model, device, dtype="bfloat16", weight_transport=transport)) as host:
            rates, nbytes = [], 0
            for version in range(1, PUSHES + 1):
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
                Row(f"{name}: of a memory copy", 100 * rate / limit, "%"),
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
    return rows


def sender(learner, host: HostedEngine, transport: str) -> WeightSender:  # type: ignore[no-untyped-def]
    """As `actors.learner.LearnerRank.push` makes it."""
    if transport == "shared_memory":
        return SharedMemorySender(host, learner.named_weights, deadline_s=120)
    return VllmSender(
        "ipc",
        host,
        learner.named_weights,
        rank=0,
        master_address="127.0.0.1",
        master_port=0,
        deadline_s=120,
        largest_tensor_bytes=learner.largest_tensor_bytes(),
    )
