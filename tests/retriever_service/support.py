"""An encoder without a model, and tiny corpora, for tests of everything around the encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.passages.corpus import PASSAGE_TEMPLATE, Passage, passage_text

DIMENSION = 32
ROOT = Path(__file__).resolve().parents[2]


class HashEncoder:
    """A bag of hashed words: texts that share words are close. Deterministic; records what it encodes."""

    dimension = DIMENSION
    pooling = ""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = dataclasses.replace(spec, query_prefix=spec.query_prefix or "")
        self.fingerprint = hashlib.sha256(repr(self.spec).encode()).hexdigest()
        self.query_batches: list[list[str]] = []

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        self.query_batches.append(list(queries))
        return np.stack([self._vector(query) for query in queries])

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for passage in passages:
            yield self._vector(passage_text(passage, self.spec.passage_template or PASSAGE_TEMPLATE))[None]
            if on_rows is not None:
                on_rows(1)

    def _vector(self, text: str) -> Vectors:
        total = np.zeros(DIMENSION, dtype=np.float32)
        for word in ["", *text.lower().split()[: self.spec.max_length]]:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total += np.random.default_rng(seed).standard_normal(DIMENSION, dtype=np.float32)
        unit: Vectors = total / np.linalg.norm(total)
        return unit


def load_hash_encoder(spec: EncoderSpec, device: str) -> HashEncoder:
    return HashEncoder(spec)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_animals(path: Path) -> Path:
    """Six passages; the last two have the same content under different ids."""
    facts = [
        ("Lion", "the lion lives on the savanna"),
        ("Tiger", "the tiger lives in the jungle"),
        ("Otter", "the otter swims in rivers"),
        ("Eagle", "the eagle nests on cliffs"),
        ("Twin", "twins look the same"),
        ("Twin", "twins look the same"),
    ]
    rows = [{"id": f"a{i}", "title": title, "text": text} for i, (title, text) in enumerate(facts)]
    return write_jsonl(path, rows)


@contextmanager
def server_process(
    module: str, *arguments: object, **settings: Any
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server that is ready, and its address. `module` takes the settings as its last argument, as JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    command.append(json.dumps({"port": 0, "grace_s": 20.0} | settings))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            transport = httpx.HTTPTransport(retries=3)
            with httpx.Client(transport=transport, base_url=url, timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    assert process.poll() is None
                    time.sleep(0.01)
            yield url, process
        finally:
            process.kill()


def real_data(name: str) -> Path:
    """The folder of a set of real passages and questions; without it the test is skipped."""
    beside_the_checkout = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("EXSEARCH_DATA") or beside_the_checkout) / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; EXSEARCH_DATA may name the folder that holds {name}")
    return folder
