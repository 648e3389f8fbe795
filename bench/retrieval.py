"""Retrieval: queries per second of 64 concurrent callers through the batching retriever against full batches."""

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

CALLERS, NUM_QUERIES, K = 64, 1_024, 3


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
        ours, limit = in_turn(lambda: _concurrently(index, queries), lambda: _directly(index, queries))
    return [
        Ratio("retrieval, 64 callers", "encoder + FAISS, full batches", "queries", ours, limit, goal=0.85)
    ]


def _concurrently(index: Path, queries: list[str]) -> float:
    async def measure() -> float:
        searcher = BatchingSearcher(lambda: SearchEngine.open(index, cached_queries=0))
        await searcher.ready()
        waiting = list(queries)
        start = time.perf_counter()

        async def caller() -> None:
            while waiting:
                await searcher.search([waiting.pop()], K)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return len(queries) / (time.perf_counter() - start)

    return asyncio.run(measure())


def _directly(index: Path, queries: list[str]) -> float:
    searcher = SearchEngine.open(index, cached_queries=0)
    start = time.perf_counter()
    for first in range(0, len(queries), 128):
        searcher.search(queries[first : first + 128], K)
    return len(queries) / (time.perf_counter() - start)
