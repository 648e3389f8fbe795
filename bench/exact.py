"""Exact search of real passages: brute force in NumPy against the library, an actor and the HTTP service.

    python -m bench.exact --index DIR [--root DIR] FILE.jsonl [FILE.jsonl ...]

The index must be Flat. The three ways must agree with each other to the last bit; and with NumPy in scores within
rounding, and in every id whose score is not within rounding of its neighbour's. Ends with status 1 if they do not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from actors.retriever import ActorReplica, RetrieverActor, RetrieverClient
from pipeline.core.data.questions import read_questions
from retriever_service.encoding.encoder import Encoder, Vectors
from retriever_service.index.store import open_index
from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine
from retriever_service.service.client import RetrieverHttpClient
from retriever_service.service.server import ServerSettings, serve

K, ROUNDING = 10, 2e-6
"""Float32 sums of 384 products of numbers below 1, in two orders."""
READY_S = 300.0
Results = Sequence[Sequence[Hit]]


def main() -> int:
    """Prints one row per way; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True, help="a built Flat index")
    parser.add_argument("--root", default="", help="folder that the files are in")
    parser.add_argument("files", nargs="+", help="questions")
    arguments = parser.parse_args()
    queries = [question.text for question in read_questions(arguments.files, root=arguments.root)]
    ways: dict[str, Callable[[Path, Sequence[str]], Results]] = {
        "library": by_library,
        "actor": by_actor,
        "HTTP": by_http,
    }
    ids, scores = brute_force(arguments.index, queries)
    table = Table(
        f"{len(queries)} queries, top {K}", "other ids", "of these ties", "largest score difference"
    )
    first: Results | None = None
    failed = False
    for name, way in ways.items():
        results = way(arguments.index, queries)
        other, ties, difference = compare(results, ids, scores)
        failed |= other > ties or difference > ROUNDING or (first is not None and results != first)
        first = first or results
        table.add_row(name, str(other), str(ties), f"{difference:.1e}")
    Console().print(table)
    return int(failed)


def brute_force(index: Path, queries: Sequence[str]) -> tuple[list[list[str]], Vectors]:
    """Ids and scores [len(queries), K + 1] of the best, by one matrix product."""
    opened = open_index(index)
    vectors = np.concatenate([segment.reconstruct_n(0, segment.ntotal) for segment in opened.segments])
    products = Encoder.load(opened.manifest.encoder).encode_queries(queries) @ vectors.T
    rows = np.argsort(-products, axis=1, kind="stable")[:, : K + 1]
    return [[opened.corpus[int(row)].id for row in best] for best in rows], np.take_along_axis(
        products, rows, axis=1
    )


def compare(results: Results, ids: list[list[str]], scores: Vectors) -> tuple[int, int, float]:
    """Places where the ids differ, how many of these are ties within rounding, and the largest score difference."""
    other = ties = 0
    difference = 0.0
    for hits, wanted, row in zip(results, ids, scores, strict=True):
        assert len(hits) == K, "short result"
        for place, hit in enumerate(hits):
            difference = max(difference, abs(hit.score - float(row[place])))
            if hit.passage.id != wanted[place]:
                other += 1
                near = [neighbour for neighbour in (place - 1, place + 1) if neighbour >= 0]
                ties += any(abs(float(row[place] - row[neighbour])) <= ROUNDING for neighbour in near)
    return other, ties, difference


def by_library(index: Path, queries: Sequence[str]) -> Results:
    return SearchEngine.open(index).search(queries, K)


def by_actor(index: Path, queries: Sequence[str]) -> Results:
    """Every query is a call of its own; the actor makes batches of them."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    try:
        client = RetrieverClient([ActorReplica(RetrieverActor.remote(str(index)))], timeout_s=READY_S)  # type: ignore[attr-defined]

        async def ask() -> Results:
            return await asyncio.gather(*(client.search(query, K) for query in queries))

        return asyncio.run(ask())
    finally:
        ray.shutdown()


def by_http(index: Path, queries: Sequence[str]) -> Results:
    """As `by_actor`, through a server in another process."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, index), daemon=True)
    server.start()
    try:
        client = RetrieverHttpClient(ours.recv(), timeout_s=READY_S, max_attempts=60)

        async def ask() -> Results:
            return [
                hits for (hits,) in await asyncio.gather(*(client.asearch([query], K) for query in queries))
            ]

        return asyncio.run(ask())
    finally:
        server.terminate()
        server.join()


def _serve(connection: Connection, index: Path) -> None:
    serve(ServerSettings(port=0), lambda: SearchEngine.open(index), connection.send)


if __name__ == "__main__":
    sys.exit(main())
