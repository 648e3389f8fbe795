"""Weight push on CPUs: bytes per second into and out of shared memory, checksums included, against a memory copy."""

from __future__ import annotations

import time

import torch

from actors.weight_bucket import Digest, Segment, write_bucket
from bench.measure import Ratio, in_turn

TENSORS, ELEMENTS = 16, 4 << 20


def run() -> list[Ratio]:
    """256 MiB of float32 in tensors of 16 MiB."""
    bucket = [(f"layer.{i}.weight", torch.randn(ELEMENTS)) for i in range(TENSORS)]
    num_bytes = TENSORS * ELEMENTS * 4
    target = torch.empty(TENSORS, ELEMENTS)
    segment = Segment()

    def ours() -> float:
        start = time.perf_counter()
        sent, received = Digest(), Digest()
        manifest = write_bucket(bucket, segment, sent)
        for row, (name, tensor) in enumerate(manifest.tensors(segment.room(manifest.nbytes))):
            received.add(name, tensor)
            target[row].copy_(tensor)
        assert sent.hexdigest() == received.hexdigest()
        return num_bytes / (1 << 20) / (time.perf_counter() - start)

    def limit() -> float:
        start = time.perf_counter()
        for row, (_, tensor) in enumerate(bucket):
            target[row].copy_(tensor)
        return num_bytes / (1 << 20) / (time.perf_counter() - start)

    rates, limits = in_turn(ours, limit)
    return [Ratio("push, shared memory", "memory copy", "MiB", rates, limits, goal=0.5)]
