"""What a search is asked and what it answers, whoever searches."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retriever_service.choices import Method
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.filters import Filter


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a search found, with its score (higher is better; its scale is the method's own)."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. Everything here changes the answer, and is part of every cache key."""

    method: Method = "dense"
    """`dense`: inner product of vectors; `bm25`: words; `hybrid`: both, by reciprocal-rank fusion."""
    rerank: int = 0
    """So many best candidates (at least k) are ordered anew by the cross-encoder; 0 leaves it out."""
    where: Filter | None = None
    """Only passages whose metadata fulfil this."""
    exclude: frozenset[str] = frozenset()
    """Ids of passages that must not come."""
    distinct: bool = False
    """Of passages with nearly the same words only the best one comes."""


DEFAULT_OPTIONS = SearchOptions()


class Searcher(Protocol):
    """Anything that finds passages for queries."""

    @property
    def fingerprint(self) -> str:
        """Equal only if every search would be answered alike."""
        ...

    def search(
        self, queries: Sequence[str], k: int, options: SearchOptions = DEFAULT_OPTIONS
    ) -> list[list[Hit]]:
        """The best `k` passages of each query, best first."""
        ...


def check_request(queries: Sequence[str], k: int) -> None:
    """Refuse what no searcher can answer.

    Raises:
        RetrieverError: k < 1, or a query that is not a string of valid Unicode.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise RetrieverError(f"k must be a whole number of at least 1, got {k!r}")
    if isinstance(queries, str):
        raise RetrieverError("queries must be a list of strings, got one string")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise RetrieverError(f"query {number} must be a string, is {type(query).__name__}")
        try:
            query.encode()
        except UnicodeEncodeError as error:
            raise RetrieverError(f"query {number} is not valid Unicode: {error}") from error


def normalise_query(query: str) -> str:
    """One spelling of queries that differ in white space or Unicode composition only (NFC).

    Searchers search for this, so that a cache may be keyed on it.
    """
    return " ".join(unicodedata.normalize("NFC", query).split())
