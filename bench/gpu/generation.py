"""Speed of the engine: start, and tokens per second at the lengths of agents' turns, with and without CUDA graphs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np

from bench.gpu.hosted import HostedEngine, engine_options, hosted, scored_per_s
from bench.gpu.models import SHAPES, random_model
from bench.gpu.rows import Row, Size
from pipeline.core.agents.program import Sampling

PROMPT, TURN = 600, 76
ANSWER = range(10, 18)
"""Token ids."""


def run(device: str, scratch: Path) -> list[Row]:
    size: Size = "0.6b" if device == "cuda" else "tiny"
    model = random_model(scratch / "model", size, device)
    requests, concurrency = (4_096, 512) if device == "cuda" else (16, 8)
    rows = []
    for eager in (True, False) if device == "cuda" else (True,):
        options = engine_options(
            model, device, enforce_eager=eager, max_num_seqs=concurrency, gpu_memory_utilization=0.85
        )
        name = f"generation, {size}, {'eager' if eager else 'CUDA graphs'}"
        started = time.perf_counter()
        with hosted(options) as host:
            rows.append(Row(f"{name}: start", time.perf_counter() - started, "s"))
            vocabulary = SHAPES[size]["vocab_size"]
            generate(host, random_prompts(vocabulary, requests // 8, seed=0), concurrency)
            prompts = random_prompts(vocabulary, requests, seed=1)
            seconds = generate(host, prompts, concurrency)
            rows += [
                Row(f"{name}: generated, {PROMPT} prompt + {TURN} tokens, {concurrency} at once",
                    requests * TURN / seconds, "tokens/s"),
                Row(f"{name}: scored, one answer of {len(ANSWER)} tokens on a cached prompt",
                    scored_per_s(host, [[*prompt, *ANSWER] for prompt in prompts[-256:]], PROMPT), "answers/s"),
            ]  # fmt: skip
    return rows


def generate(host: HostedEngine, prompts: list[list[int]], concurrency: int) -> float:
    """Seconds for a sampled turn behind each."""

    async def all_of_them() -> None:
        slots = asyncio.Semaphore(concurrency)

        async def one(number: int) -> None:
            sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=TURN, seed=number, stop=())
            async with slots:
                await host.engine.generate(prompts[number], sampling)

        await asyncio.gather(*(one(number) for number in range(len(prompts))))

    start = time.perf_counter()
    host.run(all_of_them())
    return time.perf_counter() - start


def random_prompts(vocabulary: int, number: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    ids: list[list[int]] = rng.integers(2, vocabulary, (number, PROMPT)).tolist()
    return ids
