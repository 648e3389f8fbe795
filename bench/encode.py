"""Encoding on CPUs: passages per second against a plain sentence-transformers loop in float32 on all cores.

    python -m bench.encode      every way to do it, and what it costs in nDCG@10 on SciFact

SciFact is read from the folder that EXSEARCH_DATA names, else from ../shared/data; without it that column is empty.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from bench.measure import HEADER, Ratio, in_turn, print_table
from pipeline.core.data.world.writer import write_world
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encode_workers import EncoderProcesses
from retriever_service.encoding.encoder import Encoder, EncoderSpec, OnRows, TextEncoder
from retriever_service.passages.corpus import Passage, passage_text, read_corpus
from retriever_service.passages.evaluation import evaluate_run, read_qrels, read_queries

PLAIN_BATCH, GOAL = 32, 2.0


@dataclass(frozen=True, slots=True)
class Way:
    """So many processes of so many threads, with weights of this dtype."""

    dtype: Literal["float32", "bfloat16"]
    workers: int
    threads: int

    def __str__(self) -> str:
        return f"encoding, {self.dtype}, {self.workers} x {self.threads} threads"


def ways() -> list[Way]:
    """On all cores of this machine."""
    cores = len(os.sched_getaffinity(0))
    layouts = sorted({(1, cores), (cores, 1)})
    return [Way(dtype, *layout) for dtype in ("float32", "bfloat16") for layout in layouts]


def run() -> list[Ratio]:
    """The fastest way alone."""
    with _passages() as passages:
        return [measure(ways()[-1], passages)]


def measure(way: Way, passages: Sequence[Passage]) -> Ratio:
    """Both sides have loaded their model and encoded everything once before it counts."""
    from sentence_transformers import SentenceTransformer

    from retriever_service.encoding.encoder import bundled_model

    plain = SentenceTransformer(bundled_model(), device="cpu")
    texts = [passage_text(passage) for passage in passages]
    parts = [passages[first :: way.workers] for first in range(way.workers)]
    spec = EncoderSpec(dtype=way.dtype)
    with closing(EncoderProcesses(partial(Encoder.load, spec, "cpu"), way.threads)) as processes:

        def ours() -> float:
            start = time.perf_counter()
            for _ in processes.run(
                [partial(_encode, part) for part in parts], way.workers, lambda rows: None
            ):
                pass
            return len(passages) / (time.perf_counter() - start)

        def limit() -> float:
            start = time.perf_counter()
            plain.encode(texts, batch_size=PLAIN_BATCH, show_progress_bar=False)
            return len(texts) / (time.perf_counter() - start)

        rates, limits = in_turn(ours, limit)
    return Ratio(str(way), "sentence-transformers, float32", "passages", rates, limits, GOAL)


def _encode(passages: Sequence[Passage], encoder: TextEncoder, on_rows: OnRows) -> None:
    for _ in encoder.encode_passages(passages, on_rows):
        pass


@contextmanager
def _passages() -> Iterator[list[Passage]]:
    with tempfile.TemporaryDirectory() as scratch:
        write_world(Path(scratch) / "world", seed=0, size="small")
        yield list(read_corpus([Path(scratch) / "world" / "corpus.jsonl"]))


def ndcg(dtype: Literal["float32", "bfloat16"], scifact: Path) -> float:
    """nDCG@10 of exact search on the test questions."""
    spec = EncoderSpec(dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        store = encode_corpus([scifact / "corpus.jsonl"], Path(scratch) / "vectors", spec)
        qrels = read_qrels(scifact / "qrels" / "test.tsv")
        questions = {
            id_: text for id_, text in read_queries(scifact / "queries.jsonl").items() if id_ in qrels
        }
        queries = Encoder.load(spec).encode_queries(list(questions.values()))
        scores = queries @ store.read(0, len(store)).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        answers = {
            id_: [(store.corpus[int(row)].id, float(scores[number, row])) for row in best[number]]
            for number, id_ in enumerate(questions)
        }
    return evaluate_run(qrels, answers, ["ndcg"], [10])["ndcg@10"]


def main() -> None:
    """Prints one row per way, as Markdown."""
    root = Path(
        os.environ.get("EXSEARCH_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data"
    )
    scifact = root / "scifact"
    console = Console(stderr=True)
    quality = dict.fromkeys((way.dtype for way in ways()), "")
    for dtype in quality if scifact.is_dir() else ():
        with console.status(f"SciFact in {dtype}"):
            quality[dtype] = f"{ndcg(dtype, scifact):.4f}"
    rows = []
    with _passages() as passages:
        for way in ways():
            with console.status(f"measuring: {way}"):
                rows.append([*measure(way, passages).cells(), quality[way.dtype]])
    print_table(f"{HEADER}; nDCG@10 on SciFact", rows)


if __name__ == "__main__":
    main()
