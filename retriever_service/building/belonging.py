"""Whether corpus, order and encoder belong to an index: a sample is encoded, and compared with what is stored of it.

What codes lose of a vector is taken out, so that the same is asked of every kind of index. Measured with MiniLM, as
distances relative to the length of a vector: 0.01 between weights in bfloat16 and in float32, 0.03 between the passage
prefixes "query: " and "passage: ", 0.08 between "passage: " and none, over 1 between two passages. A cosine hardly
tells these apart: 0.997 is a wrong prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.encoding.encoder import TextEncoder, Vectors
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import PASSAGE_TEMPLATE, Corpus, Passage

Rows = npt.NDArray[np.int64]

SAMPLE = 256
"""Passages that are encoded to be compared."""
NEAR = 0.025
"""Most distance, in the middle of the sample, that is a matter of number formats."""
ASTRAY = 0.3
"""Vectors that lie further apart are of different texts; a text that was cut elsewhere is nearer as a rule."""
MOST_ASTRAY = 0.05
"""Share of the sample."""
LEAST_NEAREST = 0.9
"""Share of the sample whose own vector is the nearest among the stored ones: below, nothing of it belongs together."""

OWN_FORM = "title and text"
FORMS: Mapping[str, str] = {
    OWN_FORM: PASSAGE_TEMPLATE,
    "title in quotes, text on the next line": '"{title}"\n{text}',
    "title, text on the next line": "{title}\n{text}",
    "text alone": "{text}",
}
"""How other programs put a passage before the encoder: ours, Search-R1's, Pyserini's."""


@dataclass(frozen=True, slots=True)
class _Likeness:
    """Of encoded passages to stored vectors."""

    distances: npt.NDArray[np.float64]
    """Of each, relative to the length of the encoded one; without what codes lose."""
    cosine: float
    """Median."""
    nearest: float
    """Share whose own stored vector is the nearest of all stored ones."""
    norm: float
    """Median length of the stored ones, divided by that of the encoded ones."""

    @property
    def middle(self) -> float:
        return float(np.median(self.distances))


def check_belongs(opened: Any, file: Path, corpus: Corpus, encoder: TextEncoder, seed: int) -> str:
    """Compare vectors of an index with those that the encoder gives the passages of their rows.

    Returns:
        The form (a key of `FORMS`) in which the passages were put before the encoder.

    Raises:
        RetrieverError: they are not the same; says what differs, and by how much.
    """
    count = len(corpus)
    rows = np.sort(
        np.random.default_rng(seed).choice(count, min(SAMPLE, count), replace=False, shuffle=False)
    ).astype(np.int64)
    stored = _stored(opened, file, rows)
    passages = [corpus[int(row)] for row in rows]
    compared = {
        name: _compared(opened, encoder, _in_form(passages, form), stored) for name, form in FORMS.items()
    }
    name, best = min(compared.items(), key=lambda item: item[1].middle)
    astray = np.flatnonzero(best.distances > ASTRAY)
    if best.middle <= NEAR and len(astray) <= MOST_ASTRAY * len(rows):
        return name
    if best.middle <= NEAR:
        first = int(astray[0])
        raise RetrieverError(
            f"{file} is not of this corpus: {len(astray)} of {len(rows)} passages that were encoded are other texts "
            f"than those of their rows, the first is row {rows[first]}, passage {passages[first].id!r}. Name the "
            "corpus that made it"
        )
    if best.nearest < LEAST_NEAREST:
        raise RetrieverError(
            f"{file} is not of this corpus, in this order, or not of encoder {encoder.spec.model!r}: of {len(rows)} "
            f"passages that were encoded, {best.nearest:.0%} are nearest to the vector of their own row (median cosine "
            f"{best.cosine:.3f}). Name the corpus and the encoder that made it, or with --ids the order of its rows"
        )
    raise RetrieverError(
        f"{file} is of this corpus, but its vectors are not those of encoder {encoder.spec.model!r} as it is used "
        f"here (passage prefix {encoder.spec.passage_prefix!r}, pooling {encoder.pooling or 'none'}, at most "
        f"{encoder.spec.max_length} tokens): the median distance of {len(rows)} passages is {best.middle:.3f} of their "
        f"length, {NEAR} is allowed, and their lengths differ by the factor {best.norm:.2f}. Give the model, prefixes, "
        "number format (--encoder-dtype) and number of tokens that it was made with"
    )


def _compared(opened: Any, encoder: TextEncoder, passages: Sequence[Passage], stored: Vectors) -> _Likeness:
    encoded = np.concatenate(list(encoder.encode_passages(passages)))
    lengths, own_lengths = np.linalg.norm(encoded, axis=1), np.linalg.norm(stored, axis=1)
    cosines = (encoded / lengths[:, None]) @ (stored / own_lengths[:, None]).T
    own = np.diag(cosines)
    return _Likeness(
        distances=_distances(opened, encoded, stored),
        cosine=float(np.median(own)),
        # Copies of a text are as near as the text itself.
        nearest=float(np.mean(own >= cosines.max(axis=1) - 1e-4)),
        norm=float(np.median(own_lengths / lengths)),
    )


def _distances(opened: Any, encoded: Vectors, stored: Vectors) -> npt.NDArray[np.float64]:
    """Codes put the stored vector as far from the one that was added as they put ours from itself, in no particular
    direction: the squares add up."""
    lost = np.square(_coded(opened, encoded) - encoded).sum(axis=1, dtype=np.float64)
    apart = np.square(stored - encoded).sum(axis=1, dtype=np.float64)
    lengths = np.square(encoded).sum(axis=1, dtype=np.float64)
    relative: npt.NDArray[np.float64] = np.maximum(apart - lost, 0.0) / lengths
    return np.sqrt(relative)


def _coded(opened: Any, vectors: Vectors) -> Vectors:
    """What the index would keep of these vectors."""
    kind: Any = faiss.downcast_index(opened)
    codec = faiss.downcast_index(kind.storage) if isinstance(kind, faiss.IndexHNSW) else kind
    kept: Vectors = codec.sa_decode(codec.sa_encode(np.ascontiguousarray(vectors)))
    return kept


def _stored(opened: Any, file: Path, rows: Rows) -> Vectors:
    try:
        if (inverted := faiss.try_extract_index_ivf(opened)) is not None:
            inverted.make_direct_map()
        vectors = np.stack([opened.reconstruct(int(row)) for row in rows])
        _coded(opened, vectors[:1])
        return vectors
    except RuntimeError as error:
        raise RetrieverError(
            f"{file}: its vectors cannot be told row by row, so that nothing says whether they belong to this corpus "
            f"({str(error).splitlines()[-1]:.200}); rows must be numbered from 0"
        ) from error


def _in_form(passages: Sequence[Passage], form: str) -> list[Passage]:
    return [
        replace(passage, title="", text=form.format(title=passage.title, text=passage.text))
        if passage.title
        else passage
        for passage in passages
    ]
