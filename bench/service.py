"""The HTTP service under load: latency over time, and throughput against what encoder and index can do at all.

python -m bench.service [--index DIR] [--seconds 60] [--clients 256] [--max-waiting N]

Every side runs in a process of its own, one after the other, with the same index and queries; the load comes from this
process, and nobody's cache helps. The direct rate is taken before and after the service's, so that a drift of the
machine's speed shows. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from bench import search_r1_server
from bench.load import Load, run_load
from bench.measure import print_table
from pipeline.core.data.world.writer import write_world
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.search.engine import SearchEngine
from retriever_service.service.engine_processes import engine_opener
from retriever_service.service.server import ServerSettings, serve

NUM_QUERIES, K, BATCH = 1_024, 3, 128
"""More queries than clients, so that equal ones are never in flight together."""
COMPARISON_S = 20.0
READY_S = 300.0
GOAL_DIRECT, GOAL_REFERENCE = 0.85, 3.0
_SPAWN = get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, help="a built index; default: one of a generated world")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the service is loaded")
    parser.add_argument(
        "--clients", type=int, default=256, help="connections, each with one request in flight"
    )
    parser.add_argument("--max-waiting", type=int, default=4_096, help="queries that may wait; fewer: 429s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        write_world(world, seed=0, size="small")
        index = arguments.index
        if index is None:
            index = Path(scratch) / "index"
            build_index([str(world / "corpus.jsonl")], index, EncoderSpec("minilm"))
        queries = _questions(world / "train.jsonl")
        before = _in_process(_direct, index, queries)
        ours = _loaded(
            _serve_ours, (index, arguments.max_waiting), queries, arguments.clients, arguments.seconds
        )
        after = _in_process(_direct, index, queries)
        reference = _loaded(search_r1_server.serve, (index,), queries, arguments.clients, COMPARISON_S)
    _print_windows(ours)
    _print_rates(ours, before, after, reference)


def _questions(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    hops = (hop["question"] for line in lines for hop in json.loads(line)["decomposition"])
    return list(dict.fromkeys(hops))[:NUM_QUERIES]


def _loaded(
    server: Callable[..., None], arguments: tuple[Any, ...], queries: list[str], clients: int, seconds: float
) -> Load:
    with _process(_report_address, server, arguments) as (process, address):
        _wait_until_ready(address)
        load = run_load(address, queries, clients=clients, seconds=seconds, k=K)
        process.terminate()
        process.join(timeout=READY_S)
    return load


def _serve_ours(index: Path, max_waiting: int, on_listening: Callable[[str], None]) -> None:
    settings = ServerSettings(port=0, max_batch=BATCH, max_waiting=max_waiting, cached_answers=0)
    serve(settings, engine_opener(index, cached_queries=0), on_listening)


def _report_address(connection: Connection, server: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    server(*arguments, on_listening=connection.send)


def _direct(connection: Connection, index: Path, queries: list[str]) -> None:
    """Queries per second of encoder and index on full batches."""
    engine = SearchEngine.open(index, cached_queries=0)
    batches = [queries[first : first + BATCH] for first in range(0, len(queries) - BATCH + 1, BATCH)]
    engine.search(batches[0], K)
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < COMPARISON_S:
        done += len(engine.search(batches[done // BATCH % len(batches)], K))
    connection.send(done / elapsed)


def _in_process(function: Callable[..., None], *arguments: Any) -> float:
    with _process(function, *arguments) as (_, rate):
        return float(rate)


@contextmanager
def _process(function: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """A process, and the first thing that it sends."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=function, args=(theirs, *arguments))
    process.start()
    try:
        if not ours.poll(READY_S):
            raise TimeoutError(f"{function.__name__} said nothing for {READY_S} s")
        yield process, ours.recv()
    finally:
        process.join(timeout=5)
        process.kill()
        process.join()


def _wait_until_ready(address: str) -> None:
    """Until a query is answered; both kinds of server have that in common."""
    deadline = time.monotonic() + READY_S
    while True:
        reply = httpx.post(f"{address}/retrieve", json={"queries": ["first search"]}, timeout=READY_S)
        if reply.status_code == 200:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{address} was not ready within {READY_S} s: {reply.text}")
        time.sleep(0.1)


def _print_windows(ours: Load) -> None:
    print_table(
        "from (s); answered; refused; p50 (ms); p95 (ms)",
        (
            [
                f"{window.start_s:.0f}",
                str(window.answered),
                str(window.refused),
                f"{window.p50_ms:.0f}",
                f"{window.p95_ms:.0f}",
            ]
            for window in ours.windows()
        ),
    )
    print(f"statuses: {ours.statuses}, lost connections: {ours.lost}\n")


def _print_rates(ours: Load, before: float, after: float, reference: Load) -> None:
    direct = (before + after) / 2
    print_table(
        "side; queries/s; ours relative to it; goal",
        [
            ["service", f"{ours.rate:.0f}", "", ""],
            [
                f"encoder + index directly, batches of {BATCH} ({before:.0f} before, {after:.0f} after)",
                f"{direct:.0f}",
                f"{ours.rate / direct:.2f}",
                f">= {GOAL_DIRECT}",
            ],
            [
                "one request, one search",
                f"{reference.rate:.0f}",
                f"{ours.rate / reference.rate:.2f}",
                f">= {GOAL_REFERENCE}",
            ],
        ],
    )


if __name__ == "__main__":
    main()
