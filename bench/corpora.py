"""Indexes of many passages, in minutes: those that questions are about are encoded, the others have made vectors.

    python -m bench.corpora --directory DIR 2000 100000 2000000

All passages are text of the generated encyclopedia: the 2,000 of the demo's world, which its questions are about, and
as many more as are wanted of a world that shares no name with it. To encode two million takes hours on a CPU, so only
those 2,000 go through the encoder. The vector of any other one is the sum of two of a fixed pool, chosen by the
passage's id: it lies far from all questions, is hardly ever found, and costs a search what a real one would. So an
agent does the same over every corpus, and what differs is the price of its searches. All else is the product's: the
index is of the kind that a run builds by default (exact search), and is built, checked and opened as any other.

The same arguments give the same bytes. A build that is cut off goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.core.config import RetrieverConfig
from pipeline.core.data.world.passages import generate_passages
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.data.world.writer import write_world
from pipeline.core.retrieval import encoder_spec
from retriever_service.building.build import build_index
from retriever_service.building.calibration import clustered_vectors
from retriever_service.encoding.encoder import Encoder, EncoderSpec, OnRows, Vectors
from retriever_service.index.store import MANIFEST_FILE
from retriever_service.passages.corpus import Passage

ASKED_ABOUT = WorldSpec.of_size(0, "small").num_passages
"""Passages of the demo's world."""
MADE = "made/"
"""What ids of all others begin with."""
POOL, CHUNK = 8_192, 4_096


class AskedAboutAlone:
    """The demo's encoder, for queries and for the passages of its world; others get made vectors."""

    def __init__(self, spec: EncoderSpec, device: str) -> None:
        self._encoder = encoder = Encoder.load(spec, device)
        self.spec, self.dimension = encoder.spec, encoder.dimension
        self.fingerprint, self.pooling = encoder.fingerprint, encoder.pooling
        self._pool = clustered_vectors(POOL, self.dimension, seed=0)

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        return self._encoder.encode_queries(queries)

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        remaining = iter(passages)
        while chunk := list(islice(remaining, CHUNK)):
            real = [passage for passage in chunk if not passage.id.startswith(MADE)]
            vectors = made_vectors(self._pool, [passage.id for passage in chunk])
            if real:
                rows = [row for row, passage in enumerate(chunk) if not passage.id.startswith(MADE)]
                vectors[rows] = np.concatenate(list(self._encoder.encode_passages(real)))
            yield vectors


def made_vectors(pool: Vectors, ids: Sequence[str]) -> Vectors:
    """[len(ids), dimension], of length 1; each depends on its id alone."""
    numbers = np.fromiter((zlib.crc32(one.encode()) for one in ids), np.int64, len(ids))
    first, second = numbers % len(pool), numbers // len(pool) % len(pool)
    vectors = pool[first] + pool[second]
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def index_of(directory: Path, passages: int) -> Path:
    """The index of so many passages in `directory`, built if it is not there; at least 2,000, a multiple of 100.

    Raises:
        UserError, RetrieverError: another number, or no room.
    """
    index = directory / f"index-{passages}"
    if (index / MANIFEST_FILE).exists():
        return index
    world = directory / "world"
    write_world(world, seed=0, size="small")
    sources = [world / "corpus.jsonl"]
    if passages > ASKED_ABOUT:
        others = WorldSpec(0, passages - ASKED_ABOUT, partition="pretrain")
        sources.append(_written(directory / f"passages-{passages}.jsonl", others))
    spec = replace(encoder_spec(RetrieverConfig()), dtype="float32")
    with Console(stderr=True).status(f"building {index}"):
        build_index(sources, index, spec, load_encoder=AskedAboutAlone)
    return index


def _written(path: Path, spec: WorldSpec) -> Path:
    """The passages of a world, under ids of their own; whole or absent."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for passage in generate_passages(spec):
                file.write(json.dumps(passage | {"id": MADE + passage["id"]}) + "\n")
        os.replace(partial, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("passages", type=int, nargs="+")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for passages in arguments.passages:
        print(index_of(arguments.directory, passages))


if __name__ == "__main__":
    main()
