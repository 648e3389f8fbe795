"""Retrieval: queries per second of concurrent callers through the batching retriever against full batches.

64 callers never fill a batch of 128; 256, as many as the agents of an engine on CPUs, do.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path

from bench.measure import Ratio, in_turn
from pipeline.core.data.world.writer import write_world
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.search.engine import SearchEngine
from retriever_service.service.batching import BatchingSearcher

CALLERS, NUM_QUERIES, K = (64, 256), 1_024, 3
BATCH = 128


def run() -> list[Ratio]:
    """Both sides encode every query: their caches are too small to help."""
    with tempfile.TemporaryDirectory() as scratch:
        world, index = Path(scratch) / "world", Path(scratch) / "index"
        write_world(world, seed=0, size="small")
        build_index([str(world / "corpus.jsonl")], index, EncoderSpec("minilm"))
        lines = (world / "train.jsonl").read_text(encoding="utf-8").splitlines()
        queries = [hop["question"] for line in lines for hop in json.loads(line)["decomposition"]][
            :NUM_QUERIES
        ]
        return [_ratio(index, queries, callers) for callers in CALLERS]


def _ratio(index: Path, queries: list[str], callers: int) -> Ratio:
    ours, limit = in_turn(lambda: _concurrently(index, queries, callers), lambda: _directly(index, queries))
    return Ratio(
        f"retrieval, {callers} callers", "encoder + FAISS, full batches", "queries", ours, limit, goal=0.85
    )


def _concurrently(index: Path, queries: list[str], callers: int) -> float:
    async def measure() -> float:
        searcher = BatchingSearcher(lambda: SearchEngine.open(index, cached_queries=0), max_batch=BATCH)
        await searcher.ready()
        waiting = list(queries)
        start = time.perf_counter()

        async def caller() -> None:
            while waiting:
                await searcher.search([waiting.pop()], K)

        await asyncio.gather(*(caller() for _ in range(callers)))
        return len(queries) / (time.perf_counter() - start)

    return asyncio.run(measure())


def _directly(index: Path, queries: list[str]) -> float:
    searcher = SearchEngine.open(index, cached_queries=0)
    start = time.perf_counter()
    for first in range(0, len(queries), BATCH):
        searcher.search(queries[first : first + BATCH], K)
    return len(queries) / (time.perf_counter() - start)
