"""A benchmark of a few animals: two domains, three tasks, one corpus for two of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.benchmarks.spec import Benchmark, read_benchmark
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.corpus import Passage
from tests.retriever_service.support import HashEncoder, write_jsonl

ANIMALS = ["lion savanna", "tiger jungle", "otter river", "eagle cliff", "whale sea", "camel desert"]


class CountingEncoders:
    """Loads hashing encoders; remembers each load, what was asked of them and how many passages they encoded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.encoders: list[HashEncoder] = []
        self.passages = 0

    def __call__(self, spec: EncoderSpec, device: str) -> HashEncoder:
        self.loaded.append(spec.model)
        encoder, counting = HashEncoder(spec), self

        def encode_passages(passages: Any, on_rows: Any = None) -> Any:
            for vectors in HashEncoder.encode_passages(encoder, passages, on_rows):
                counting.passages += len(vectors)
                yield vectors

        encoder.encode_passages = encode_passages  # type: ignore[method-assign]
        self.encoders.append(encoder)
        return encoder

    @property
    def asked(self) -> list[str]:
        return [query for encoder in self.encoders for batch in encoder.query_batches for query in batch]


class KeywordReranker:
    """Prefers passages of one word; remembers the pairs."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.pairs: list[tuple[str, Passage]] = []

    def scores(self, pairs: Sequence[tuple[str, Passage]]) -> list[float]:
        self.pairs += pairs
        return [float(self.word in passage.text) for _, passage in pairs]


def write_benchmark(folder: Path, **changes: Any) -> Path:
    """The file, and the data it names. Query ids are numbers, as those of the passages are."""
    write_jsonl(
        folder / "animals.jsonl", [{"id": str(n), "title": "", "text": t} for n, t in enumerate(ANIMALS)]
    )
    write_jsonl(
        folder / "rocks.jsonl", [{"_id": f"r{n}", "title": "", "text": f"rock {n}"} for n in range(4)]
    )
    land = [
        {"id": n, "query": ANIMALS[n].split()[0], "labels": [{"id": n, "relevance": 1}]} for n in range(3)
    ]
    water = [
        {"id": 0, "query": "sea", "instruction": "Find a whale.", "labels": [{"id": 4}, {"id": 2}]},
        {"id": 1, "query": "river", "instruction": "", "labels": [{"id": 2}]},
    ]
    write_jsonl(folder / "land.jsonl", land)
    write_jsonl(folder / "water.jsonl", water)
    write_jsonl(folder / "stone.jsonl", [{"_id": "s1", "text": "rock 3"}, {"_id": "s2", "text": "rock 1"}])
    (folder / "stone.tsv").write_text("query-id\tcorpus-id\tscore\ns1\tr3\t2\ns1\tr1\t1\n")
    tree: dict[str, Any] = {
        "title": "animals and rocks",
        "root": str(folder),
        "corpora": {"animals": "animals.jsonl", "rocks": "rocks.jsonl"},
        "tasks": {
            "land": {"domain": "animals", "corpus": "animals", "queries": "land.jsonl"},
            "water": {"domain": "animals", "corpus": "animals", "queries": "water.jsonl"},
            "stone": {
                "domain": "rocks",
                "corpus": "rocks",
                "queries": "stone.jsonl",
                "qrels": "stone.tsv",
                "instruction": "Find the rock.",
            },
        },
        "retrievers": {"bm25": {"method": "bm25"}, "hash": {}, "both": {"method": "hybrid"}},
        "bootstrap_samples": 20,
    }
    path = folder / "animals.yaml"
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


def benchmark_of(folder: Path, *overrides: str, **changes: Any) -> Benchmark:
    return read_benchmark(write_benchmark(folder, **changes), overrides)
