"""Which of several texts say nearly the same in the same words."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from retriever_service.passages.corpus import passage_text
from retriever_service.passages.hits import Hit

SHINGLE_WORDS = 3
THRESHOLD = 0.9
"""Texts are near-identical if their sets of word triples have at least this Jaccard similarity."""

_WORD = re.compile(r"\w+")

Shingle = tuple[str, ...]


def drop_duplicates(hits: Sequence[Hit]) -> list[Hit]:
    """The hits without those that are near-identical to a better one, in the same order."""
    return [hits[i] for i in first_of_each([passage_text(hit.passage) for hit in hits])]


def first_of_each(texts: Sequence[str]) -> list[int]:
    """The places of the texts that stay, ascending: all that are not near-identical to an earlier one that stays.

    Case, punctuation, spacing and Unicode composition make no difference.
    """
    kept: dict[int, frozenset[Shingle]] = {}
    by_shingle: defaultdict[Shingle, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        shingles = _shingles(text)
        # Sets that are so similar share one of the first few shingles of each, in whatever order all are sorted:
        # only texts that do are compared.
        prefix = sorted(shingles)[: len(shingles) - int(THRESHOLD * len(shingles)) + 1]
        candidates = {earlier for shingle in prefix for earlier in by_shingle[shingle]}
        if any(_jaccard(shingles, kept[earlier]) >= THRESHOLD for earlier in candidates):
            continue
        kept[place] = shingles
        for shingle in prefix:
            by_shingle[shingle].append(place)
    return list(kept)


def _shingles(text: str) -> frozenset[Shingle]:
    """Never empty: a shorter text is one shingle, and one without words its other characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _WORD.findall(folded) or folded.split()
    last = max(0, len(words) - SHINGLE_WORDS)
    return frozenset(tuple(words[i : i + SHINGLE_WORDS]) for i in range(last + 1))


def _jaccard(a: frozenset[Shingle], b: frozenset[Shingle]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)
