"""How far stored vectors are from what an encoder makes of the same passages: right and wrong encoders and corpora.

python -m bench.belonging CORPUS.jsonl

Encodes the first passages by MiniLM in float32 as if that were somebody else's index, in several kinds of FAISS index,
and compares each with what `exsearch index import` would make of them in other ways. Prints the root mean square
deviation of the sample and of its longest passages; what exceeds `NEAR` in either is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from retriever_service.building.belonging import compare, draw
from retriever_service.building.ready_index import ReadyIndex
from retriever_service.encoding.encoder import Encoder, EncoderSpec, OnRows, TextEncoder, Vectors
from retriever_service.passages.corpus import Corpus, Passage, read_corpus, write_passages

RIGHT = EncoderSpec(
    "minilm", "", "passage: ", max_length=256, dtype="float32", passage_template='"{title}"\n{text}'
)
FACTORIES = ("Flat", "SQ8", "IVF16,SQ4", "PQ96x4", "PQ48x4", "OPQ48_192,PQ48x4")
ENCODERS = {
    "the same": RIGHT,
    "weights in bfloat16": replace(RIGHT, dtype="bfloat16"),
    "weights in float16": replace(RIGHT, dtype="float16"),
    "at most 250 tokens": replace(RIGHT, max_length=250),
    "at most 200 tokens": replace(RIGHT, max_length=200),
    "at most 128 tokens": replace(RIGHT, max_length=128),
    "prefix 'query: '": replace(RIGHT, passage_prefix="query: "),
    "no prefix": replace(RIGHT, passage_prefix=""),
    "title without quotes": replace(RIGHT, passage_template="{title}\n{text}"),
    "text alone": replace(RIGHT, passage_template="{text}"),
}


def main() -> None:
    """Prints one row per way of being wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="passages, some of them longer than the encoder's limit")
    parser.add_argument("--passages", type=int, default=1_500, help="how many are taken")
    arguments = parser.parse_args()
    passages = list(islice(read_corpus([arguments.corpus]), arguments.passages))
    vectors = np.concatenate(list(Encoder.load(RIGHT, "cpu").encode_passages(passages)))
    corpora = {
        "the last passage is the first": [passages[-1], *passages[:-1]],
        "the last 4 % in another order": _last_reversed(passages, len(passages) // 25),
    }
    table = Table("compared with", *FACTORIES)
    with TemporaryDirectory() as directory:
        indexes = [
            _written(Path(directory) / f"{i}", factory, vectors) for i, factory in enumerate(FACTORIES)
        ]
        cases = [(name, spec, passages) for name, spec in ENCODERS.items()]
        cases += [(name, RIGHT, given) for name, given in corpora.items()]
        for name, spec, given in cases:
            path = Path(directory) / "passages"
            write_passages(given, path)
            corpus, encoder = Corpus(path), _Once(Encoder.load(spec, "cpu"))
            cells = [_deviations(ready, corpus, encoder, spec.passage_template or "") for ready in indexes]
            table.add_row(name, *cells)
            Console(stderr=True).print(name, *cells)
    Console(width=160).print(table)


class _Once(Encoder):
    """Encodes the passages that every index is compared with a single time."""

    def __init__(self, encoder: Encoder) -> None:
        self.spec, self._encoder, self._vectors = encoder.spec, encoder, list[Vectors]()

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        if not self._vectors:
            self._vectors = list(self._encoder.encode_passages(passages))
        return iter(self._vectors)


def _last_reversed(passages: Sequence[Passage], count: int) -> list[Passage]:
    return [*passages[:-count], *reversed(passages[-count:])]


def _written(path: Path, factory: str, vectors: np.ndarray) -> ReadyIndex:
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return ReadyIndex.open(path, None)


def _deviations(ready: ReadyIndex, corpus: Corpus, encoder: TextEncoder, template: str) -> str:
    drawn, longest = draw(corpus, seed=0)
    compared = compare(ready, corpus, np.union1d(drawn, longest), encoder, template)
    return " / ".join(f"{compared.among(rows).deviation():.3f}" for rows in (drawn, longest))


if __name__ == "__main__":
    main()
