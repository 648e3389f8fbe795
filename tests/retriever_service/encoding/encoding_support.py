"""Jobs of encoding and what they leave behind, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.encoding.vectors import VectorStore
from tests.retriever_service.encoding_child import SHARD_ROWS
from tests.retriever_service.support import load_hash_encoder, write_jsonl

SPEC = EncoderSpec("hash")
COUNT = 21  # three shards, the last one short


def write_corpus(path: Path, count: int = COUNT) -> Path:
    rows = ({"id": f"p{i}", "title": f"T{i}", "text": f"word{i} of {i % 4}"} for i in range(count))
    return write_jsonl(path, rows)


def encode(corpus: Path, out: Path, spec: EncoderSpec = SPEC, **options: Any) -> VectorStore:
    options = {"workers": 1, "shard_rows": SHARD_ROWS, "load_encoder": load_hash_encoder} | options
    return encode_corpus([corpus], out, spec, **options)


def child(corpus: Path, out: Path, *arguments: Any) -> list[str]:
    module = "tests.retriever_service.encoding_child"
    return [sys.executable, "-m", module, str(corpus), str(out), *map(str, arguments)]


def files(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
