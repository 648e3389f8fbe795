"""Scoring gold answers on the cached text of trajectories just sampled, against a pass over the whole text."""

from __future__ import annotations

import asyncio

import numpy as np

from bench.gpu.hosted import HostedEngine, engine_options, hosted, scored_per_s
from bench.measure import TINY, Brevity, Ratio, in_turn
from pipeline.core.agents.program import Sampling

TEXT, ANSWER = 346, 8
"""Tokens of a trajectory of the demo, and of an answer."""
TRAJECTORIES, FEW = 200, 16


def run() -> list[Ratio]:
    """Both give the same sums; the second side sees every text for the first time."""
    count = FEW if Brevity.is_on else TRAJECTORIES
    random = np.random.default_rng(0)
    with hosted(engine_options(TINY, "cpu")) as host:

        def fresh() -> list[list[int]]:
            ids: list[list[int]] = random.integers(20, 400, (count, TEXT + ANSWER)).tolist()
            return ids

        def cached() -> float:
            texts = fresh()
            host.run(_read(host, texts))
            return scored_per_s(host, texts, TEXT)

        ours, limit = in_turn(cached, lambda: scored_per_s(host, fresh(), TEXT))
    return [Ratio("scoring, on cached text", "a pass over the whole text", "answers", ours, limit, goal=3.0)]


async def _read(host: HostedEngine, texts: list[list[int]]) -> None:
    """As sampling does: afterwards the cache holds their keys and values."""
    await asyncio.gather(*(host.engine.generate(text[:TEXT], Sampling(0.0, max_tokens=1)) for text in texts))
