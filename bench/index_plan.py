"""The planner's predictions against indexes that are really built.

python -m bench.index_plan --directory DIR [--count 1000000] [--dimension 384] [--memory-mb 1100] [FACTORY ...]

Clustered vectors are generated, and every factory is built within the memory bound, in a process of its own. Prints
two Markdown tables: size, peak memory and time, predicted and measured; and what opening each index takes, and how
much memory one and two processes take that have it open and search it. The vectors stay in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console

from bench.measure import print_table
from retriever_service.building.build import build_from_vectors
from retriever_service.building.calibration import calibrate, clustered_vectors
from retriever_service.building.planner import Plan, plan_index
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.encoding.vectors import VectorStore
from retriever_service.index.store import open_index
from retriever_service.passages.corpus import Passage

FACTORIES = (
    "Flat",
    "SQfp16",
    "SQ8",
    "PQ96",
    "IVF1024,Flat",
    "IVF1024,SQ8",
    "IVF1024,PQ96",
    "IVF4096_HNSW32,SQ8",
    "OPQ96_384,IVF1024,PQ96",
    "PCA192,IVF1024,SQ8",
    "HNSW16,Flat",
    "HNSW32,SQ8",
)
BLOCK_ROWS = 8_192
NUM_QUERIES, K = 256, 10
WAIT_S = 600
_SPAWN = get_context("spawn")
_console = Console(stderr=True)
T = TypeVar("T")


class NumberedVectors:
    """An encoder for whom the passage "17" is row 17 of a generated collection."""

    fingerprint = hashlib.sha256(b"clustered vectors by number").hexdigest()
    pooling = ""

    def __init__(self, spec: EncoderSpec, device: str) -> None:
        self.spec = replace(spec, query_prefix="", passage_prefix="", normalise=True, max_length=1)
        self.dimension = int(spec.model)

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        return np.concatenate(list(self.encode_passages(Passage(query, "", query) for query in queries)))

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        number, block = -1, np.empty((0, self.dimension), dtype=np.float32)
        for passage in passages:
            row = int(passage.text)
            if row // BLOCK_ROWS != number:
                number = row // BLOCK_ROWS
                block = clustered_vectors(BLOCK_ROWS, self.dimension, seed=number)
            yield block[row % BLOCK_ROWS][None]


@dataclass(frozen=True, slots=True)
class Built:
    """What one build was predicted to take, and what it took."""

    plan: Plan
    index_bytes: int
    peak_bytes: int
    seconds: float

    def cells(self) -> list[str]:
        assert self.plan.seconds is not None
        pairs = (
            (self.plan.index_bytes / 1e6, self.index_bytes / 1e6),
            (self.plan.build_memory_bytes / 1e6, self.peak_bytes / 1e6),
            (self.plan.seconds.total, self.seconds),
        )
        compared = [cell for a, b in pairs for cell in (f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.2f}")]
        return [f"`{self.plan.request.factory}`", str(len(self.plan.segments)), *compared]


def main() -> None:
    """Prints the tables to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="on a disk with room for it all")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--memory-mb", type=int, default=1_100, help="bound of every build")
    parser.add_argument("factories", nargs="*", default=FACTORIES, help="FAISS factory strings")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with _console.status("generating vectors"):
        vectors = _generate(arguments.directory, arguments.count, arguments.dimension)
    rows, opened = [], []
    for number, factory in enumerate(arguments.factories):
        out = arguments.directory / f"index-{number}"
        shutil.rmtree(out, ignore_errors=True)
        with _console.status(f"building {factory}"):
            rows.append(_in_a_process(_build, vectors, out, factory, arguments.memory_mb * 1_000_000).cells())
            opened.append(_replicas(out, factory))
        shutil.rmtree(out)
    print_table(
        "factory; segments; size predicted (MB); measured; ratio; peak memory predicted (MB); measured; ratio; "
        "time predicted (s); measured; ratio",
        rows,
    )
    print_table(
        "index; opened in (s); one process (MB); two processes (MB); ratio",
        opened,
    )


def _generate(directory: Path, count: int, dimension: int) -> Path:
    vectors, corpus = directory / f"vectors-{count}x{dimension}", directory / f"corpus-{count}.jsonl"
    if not corpus.exists():
        lines = (f'{{"id": "{row}", "text": "{row}"}}\n' for row in range(count))
        corpus.write_text("".join(lines))
    encode_corpus([corpus], vectors, EncoderSpec(str(dimension)), workers=1, load_encoder=NumberedVectors)
    return vectors


def _in_a_process(work: Callable[..., T], *arguments: object) -> T:
    """Run `work` in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(work, *arguments).result()


def _build(vectors: Path, out: Path, factory: str, memory_bytes: int) -> Built:
    store = VectorStore.open(vectors)
    count, dimension = store.manifest.count, store.manifest.dimension
    plan = plan_index(
        count,
        dimension,
        factory,
        memory_bytes=memory_bytes,
        passage_bytes=store.manifest.passages.bytes / count,
        has_vectors=True,
        calibration=_in_a_process(calibrate, factory, dimension, out.parent),
    )
    start = time.perf_counter()
    build_from_vectors(store, out, factory=factory, memory_bytes=memory_bytes)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in out.rglob("*.faiss"))
    return Built(plan, size, _kib("/proc/self/status", "VmHWM"), seconds)


def _replicas(index_dir: Path, factory: str) -> list[str]:
    """Cells: seconds to open, and proportional memory of one and of two processes that search an index."""
    replicas, memory = [], []
    for _ in range(2):
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(index_dir, theirs), daemon=True)
        process.start()
        replicas.append((process, ours))
        opened = _receive(ours)
        for _, pipe in replicas:
            pipe.send(True)
        memory.append(sum(_receive(pipe) for _, pipe in replicas))
    for process, pipe in replicas:
        pipe.send(False)
        process.join(WAIT_S)
    one, two = memory
    return [f"`{factory}`", f"{opened:.3f}", f"{one / 1e6:,.0f}", f"{two / 1e6:,.0f}", f"{two / one:.2f}"]


def _serve(index_dir: Path, pipe: Connection) -> None:
    """One replica: says how long opening took, and, whenever asked, its share of memory after a search."""
    start = time.perf_counter()
    index = open_index(index_dir)
    pipe.send(time.perf_counter() - start)
    queries = clustered_vectors(NUM_QUERIES, index.manifest.dimension, seed=0)
    while pipe.recv():
        for segment in index.segments:
            segment.search(queries, K)
        pipe.send(_kib("/proc/self/smaps_rollup", "Pss"))


def _receive(pipe: Connection) -> float:
    if not pipe.poll(WAIT_S):
        raise TimeoutError(f"a replica has not answered for {WAIT_S} s")
    answer: float = pipe.recv()
    return answer


def _kib(file: str, key: str) -> int:
    """Bytes of a field that the kernel gives in KiB."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
