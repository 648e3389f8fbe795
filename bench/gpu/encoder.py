"""The sentence encoder on the device against the CPU: equal vectors, texts per second; and FAISS on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.rows import Row, at_least, at_most
from retriever_service.encoding.encoder import Encoder, EncoderSpec, Vectors
from retriever_service.passages.corpus import Passage


def run(device: str, scratch: Path) -> list[Row]:
    count = 16_384 if device == "cuda" else 64
    rng = np.random.default_rng(0)
    words = np.array(
        ["the", "river", "city", "author", "harp", "founded", "born", "bridge", "year", "mill", "king"]
    )
    passages = [Passage(str(i), "", " ".join(rng.choice(words, rng.integers(10, 120)))) for i in range(count)]
    exact = encode(Encoder.load(EncoderSpec("minilm"), "cpu"), passages[:64])
    rows = []
    for dtype in ("float32", "bfloat16"):
        encoder = Encoder.load(EncoderSpec("minilm", dtype=dtype), device)
        vectors = encode(encoder, passages[:64])
        cosine = float((vectors * exact).sum(1).min())
        rows.append(at_least(f"encoder, {dtype}: smallest cosine to float32 on the CPU", cosine, "",
                             0.9999 if dtype == "float32" else 0.99))  # fmt: skip
        encode(encoder, passages[: count // 8])
        start = time.perf_counter()
        encode(encoder, passages)
        rows.append(
            Row(f"encoder, {dtype}: passages of 10 to 120 words", count / (time.perf_counter() - start), "/s")
        )
    return [*rows, *search(device)]


def encode(encoder: Encoder, passages: Sequence[Passage]) -> Vectors:
    return np.concatenate(list(encoder.encode_passages(passages)))


def search(device: str) -> list[Row]:
    """Exact search on the device against NumPy, where FAISS has been built for GPUs."""
    import faiss

    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        return [Row("FAISS on the GPU: not installed (faiss-cpu is)", 0, "")]
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1_000_000 if device == "cuda" else 2_000, 384), dtype=np.float32)
    queries = rng.standard_normal((1_024 if device == "cuda" else 16, 384), dtype=np.float32)
    index: Any = faiss.IndexFlatIP(384)
    index.add(vectors)
    if device == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.search(queries[:16], 10)
    start = time.perf_counter()
    _, found = index.search(queries, 10)
    seconds = time.perf_counter() - start
    best = np.argmax(queries[:64] @ vectors.T, axis=1)
    wrong = float((found[:64, 0] != best[: len(found[:64])]).mean())
    return [
        Row(f"FAISS Flat, {len(vectors)} x 384, 10 best", len(queries) / seconds, "queries/s"),
        at_most("FAISS Flat: first hits that are not NumPy's", wrong, "", 0.0),
    ]
