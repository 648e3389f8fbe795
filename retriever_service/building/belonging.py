"""Whether corpus, order and encoder belong to an index: a sample is encoded, and compared with what is stored of it.

What is compared is how much further apart the two are than the codes of the index alone would put them, relative to
the length of a vector: next to 0 for the same encoder, whatever the codes. `python -m bench.belonging` measures it for
right and wrong encoders and corpora (docs/retriever.md has the figures). A cosine hardly tells these apart: 0.997 is
a wrong prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from string import Formatter

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.building.ready_index import ReadyIndex, Rows
from retriever_service.encoding.encoder import TextEncoder, Vectors
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import PASSAGE_TEMPLATE, Corpus, Passage, passage_text

Floats = npt.NDArray[np.float64]

SAMPLE = 256
"""Passages drawn from the whole corpus."""
LONGEST, DRAWN_FOR_LONGEST = 64, 4_096
"""Of so many that are drawn, the longest besides: where a text was cut shows in no other."""
NEAR = 0.025
"""Most deviation that is a matter of number formats."""
TEMPLATES = (PASSAGE_TEMPLATE, '"{title}"\n{text}', "{title}\n{text}", "{text}")
"""Ours and Pyserini's fields; Search-R1's and FlashRAG's contents; Pyserini's contents; the text alone."""
_TRIED = 32
"""Passages by which one of them is chosen."""
_SAME_LENGTH = 0.02
_SHORT = 0.25
"""Share of the passages, the shortest, that no limit of tokens cuts as a rule."""
_FEW = 0.5
_MOSTLY = 0.9
"""Share of passages that are nearest to the vector of their own row, if corpus and order are the right ones."""


def check_template(template: str) -> None:
    """Refuse what cannot be filled with a title and a text.

    Raises:
        RetrieverError: says what it may hold.
    """
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError:
        fields = set()
    if "text" not in fields or not fields <= {"title", "text"}:
        raise RetrieverError(
            f"passage template {template!r}: it must hold {{text}}, may hold {{title}}, and no other braces"
        )


def check_belongs(
    ready: ReadyIndex, corpus: Corpus, encoder: TextEncoder, template: str | None, seed: int
) -> str:
    """Compare vectors of an index with those that the encoder gives the passages of their rows.

    Args:
        template: None to find out which of `TEMPLATES` it was.

    Returns:
        The template by which titles were put before texts.

    Raises:
        RetrieverError: they are not the same, or cannot be searched by inner product; says what differs, by how much.
    """
    drawn, longest = draw(corpus, seed)
    if template is None:
        template = min(
            TEMPLATES, key=lambda form: compare(ready, corpus, drawn[:_TRIED], encoder, form).deviation()
        )
    compared = compare(ready, corpus, np.union1d(drawn, longest), encoder, template)
    # Not "any above it": also where one of them is not a number.
    if not all(compared.among(rows).deviation() <= NEAR for rows in (drawn, longest)):
        raise RetrieverError(f"{ready.file} {_what_differs(compared, corpus, encoder, template)}")
    _check_metric(ready, compared.lengths)
    return template


def draw(corpus: Corpus, seed: int) -> tuple[Rows, Rows]:
    """A sample of rows, and the longest of a larger one."""
    many = np.random.default_rng(seed).permutation(len(corpus))[:DRAWN_FOR_LONGEST].astype(np.int64)
    sizes = np.array([len(corpus[int(row)].text) for row in many])
    return many[:SAMPLE], many[np.argsort(-sizes, kind="stable")[:LONGEST]]


@dataclass(frozen=True, slots=True)
class Compared:
    """Passages and the vectors of their rows; arrays are [passages]."""

    rows: Rows
    excess: Floats
    """Square of the distance between stored and encoded vector, less that which codes make, over the squared length."""
    own: npt.NDArray[np.bool_]
    """Whether no stored vector of another passage is nearer."""
    lengths: Floats
    """Of the encoded vectors."""
    stored_lengths: Floats
    """Of the stored ones, over those of the encoded ones once they are coded."""
    sizes: npt.NDArray[np.int64]
    """Characters."""

    def among(self, rows: Rows) -> Compared:
        return self.where(np.isin(self.rows, rows))

    def where(self, mask: npt.NDArray[np.bool_]) -> Compared:
        return Compared(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))

    def deviation(self) -> float:
        """Root mean square."""
        return float(np.sqrt(np.maximum(self.excess.mean(), 0.0)))


def compare(ready: ReadyIndex, corpus: Corpus, rows: Rows, encoder: TextEncoder, template: str) -> Compared:
    rows = np.sort(rows)
    texts = [passage_text(corpus[int(row)], template) for row in rows]
    encoded = np.concatenate(list(encoder.encode_passages(Passage("", "", text) for text in texts)))
    stored, coded = ready.sample(rows), ready.coded(encoded)
    lengths = _lengths(encoded)
    # Codes put the stored vector as far from the one that was added as they put ours from itself, in no particular
    # direction: the squares add up.
    excess = np.square(_lengths(stored - encoded)) - np.square(_lengths(coded - encoded))
    towards = (encoded / lengths[:, None]) @ (stored / _lengths(stored)[:, None]).T
    return Compared(
        rows=rows,
        excess=excess / np.square(lengths),
        # Copies of a text are as near as the text itself.
        own=np.diagonal(towards) >= towards.max(axis=1) - 1e-4,
        lengths=lengths,
        stored_lengths=_lengths(stored) / _lengths(coded),
        sizes=np.array([len(text) for text in texts]),
    )


def _lengths(vectors: Vectors) -> Floats:
    lengths: Floats = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return lengths


def _what_differs(compared: Compared, corpus: Corpus, encoder: TextEncoder, template: str) -> str:
    """The likeliest, with the numbers that say so."""
    number, model = len(compared.rows), encoder.spec.model
    if compared.own.mean() < _MOSTLY:
        return (
            f"is not of this corpus, in this order, or not of encoder {model!r}: of {number} passages that were "
            f"encoded, {compared.own.sum()} are nearest to the vector of their own row. Name the corpus and the "
            "encoder that made it, or with --ids the order of its rows"
        )
    found = (
        f"is of this corpus, but its vectors are not those of encoder {model!r} as it is used here: they are "
        f"{compared.deviation():.3f} of their length away from it, as a root mean square of {number} passages; "
        f"{NEAR} is allowed"
    )
    ratio = float(np.median(compared.stored_lengths))
    if abs(ratio - 1) > _SAME_LENGTH:
        return (
            f"{found}. They are {ratio:.3g} times as long: one of the two scales them to length 1. Give --normalise or "
            "--no-normalise"
        )
    differing = ~(compared.excess <= NEAR**2)
    short = compared.where(compared.sizes <= np.quantile(compared.sizes, _SHORT))
    if compared.own[differing].all() and short.deviation() <= NEAR:
        return (
            f"{found}. The shortest agree ({short.deviation():.3f}): texts were cut at another number of tokens than "
            f"{encoder.spec.max_length}. Give --max-tokens"
        )
    if differing.mean() < _FEW:
        first = int(compared.rows[differing][0])
        return (
            f"holds vectors of other texts: {differing.sum()} of {number} passages that were encoded differ from what "
            f"is in their rows, the first is passage {corpus[first].id!r} in row {first}; the others agree. Name the "
            f"corpus as it was when the index was made, or, where texts were cut at another number of tokens than "
            f"{encoder.spec.max_length}, give --max-tokens"
        )
    return (
        f"{found}. Give the model, pooling (here {encoder.pooling or 'none'}), --passage-prefix (here "
        f"{encoder.spec.passage_prefix!r}), --passage-template (here {template!r}), --encoder-dtype and --max-tokens "
        "that it was made with"
    )


def _check_metric(ready: ReadyIndex, lengths: Floats) -> None:
    """By distances the order is that of inner products only where all vectors are of length 1."""
    if ready.index.metric_type == faiss.METRIC_L2 and not np.allclose(lengths, 1.0, atol=1e-3):
        raise RetrieverError(
            f"{ready.file} is searched by L2 distances, and its vectors are {lengths.min():.3f} to "
            f"{lengths.max():.3f} long: the nearest are not those of the largest inner product, by which is searched "
            "here. Build the index with faiss.METRIC_INNER_PRODUCT"
        )
