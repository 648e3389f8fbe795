"""Tokens on their way from a worker to a shard and from there to the learner, against one copy of their buffers."""

from __future__ import annotations

import time

import numpy as np

from bench.measure import Ratio, in_turn
from pipeline.core.record_tables import examples_from_table, examples_to_table
from pipeline.core.records import Example

EXAMPLES, TOKENS = 400, 2_000
"""Of a shard: 100 questions of 4 trajectories, as long as those of a large model."""


def run() -> list[Ratio]:
    """Into Arrow's columns and out of them; compression and disk are not in it."""
    random = np.random.default_rng(0)
    examples = []
    for number in range(EXAMPLES):
        ids = random.integers(0, 150_000, TOKENS).astype(np.int32)
        mask = np.arange(TOKENS) % 300 >= 200
        name, weight = f"q{number // 4}/{number % 4}", np.zeros(1)
        examples.append(Example(name, name, "searcher", ids, mask, {"log_weight": weight}))
    megabytes = sum(e.token_ids.nbytes + e.loss_mask.nbytes for e in examples) / 1e6

    def ours() -> float:
        start = time.perf_counter()
        examples_from_table(examples_to_table(examples))
        return megabytes / (time.perf_counter() - start)

    def limit() -> float:
        start = time.perf_counter()
        np.concatenate([e.token_ids for e in examples]), np.concatenate([e.loss_mask for e in examples])
        return megabytes / (time.perf_counter() - start)

    return [
        Ratio("tokens into columns and back", "one copy of the buffers", "MB", *in_turn(ours, limit), 0.5)
    ]
