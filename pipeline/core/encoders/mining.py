"""Hard negatives: what an encoder ranks high for a query and nobody judged relevant.

Guarantees:
- no negative of a query is relevant to it, nor has the same text as what is;
- what scores above the positive less the margin is left out, for it may well be relevant though nobody judged it, and
  counted; with a margin of None nothing is;
- every pair has as many negatives: what the candidates lack is filled with random passages, and counted; a pair for
  which the corpus has too few is left out, and counted.

Source of the guard: Moreira et al. 2024, "NV-Retriever", arXiv 2407.15831 (TopK-MarginPos).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.benchmarks.queries import Query
from pipeline.core.benchmarks.searching import Ranking


@dataclass(frozen=True, slots=True)
class Pair:
    """One training row: a query, one of its relevant passages, and negatives, hardest first."""

    query: Query
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mined:
    """The rows of a round, and what was counted.

    left_out: candidates above the guard that stood in front of the last negative taken, in all rows together. filled:
    random negatives. not_there: relevant passages that the corpus does not have, which make no row. too_few: rows that
    are left out because the corpus has too few passages that are neither relevant nor suspected.
    """

    pairs: tuple[Pair, ...]
    left_out: int
    filled: int
    not_there: int
    too_few: int


def mine(
    queries: Sequence[Query],
    rankings: Sequence[Ranking],
    texts: Mapping[str, str],
    *,
    negatives: int,
    margin: float | None,
    seed: int,
) -> Mined:
    """A row for each relevant passage of each query.

    Args:
        rankings: of each query the candidates, with the encoder's scores; a positive that is not among them scores
            below all of them.
        texts: of every passage of the corpus, by id.
        negatives: of each row.
        margin: of the guard, at least 0, in the unit of the scores.
    """
    rng = np.random.default_rng(seed)
    ids = list(texts)
    pairs: list[Pair] = []
    left_out = filled = not_there = too_few = 0
    for query, ranking in zip(queries, rankings, strict=True):
        positives = [id_ for id_ in query.relevant if id_ in texts]
        not_there += len(query.relevant) - len(positives)
        same = {texts[id_] for id_ in positives}
        candidates = [(id_, score) for id_, score in ranking if texts[id_] not in same]
        scores = dict(ranking)
        for positive in positives:
            taken, suspected = _take(candidates, scores.get(positive), negatives, margin)
            left_out += len(suspected)
            missing = negatives - len(taken)
            others = _random(ids, texts, same, {*suspected, *taken}, missing, rng)
            if len(others) < missing:
                too_few += 1
                continue
            filled += missing
            pairs.append(Pair(query, positive, (*taken, *others)))
    return Mined(tuple(pairs), left_out, filled, not_there, too_few)


def _take(
    candidates: Ranking, positive: float | None, wanted: int, margin: float | None
) -> tuple[list[str], list[str]]:
    """The best candidates below the guard, and those above it that were passed over."""
    if margin is None:
        return [id_ for id_, _ in candidates[:wanted]], []
    if positive is None:
        return [], [id_ for id_, _ in candidates]
    taken: list[str] = []
    suspected: list[str] = []
    for id_, score in candidates:
        if len(taken) == wanted:
            break
        (suspected if score > positive - margin else taken).append(id_)
    return taken, suspected


def _random(
    ids: Sequence[str],
    texts: Mapping[str, str],
    same: set[str],
    barred: set[str],
    wanted: int,
    rng: np.random.Generator,
) -> list[str]:
    """So many different passages that are neither barred nor of the same text as relevant ones; fewer if there are."""
    found: dict[str, None] = {}
    for _ in range(20 * wanted):
        if len(found) == wanted:
            break
        id_ = ids[int(rng.integers(len(ids)))]
        if id_ not in barred and texts[id_] not in same:
            found[id_] = None
    if len(found) < wanted:  # nearly all of a small corpus is barred: look at what is left
        rest = [id_ for id_ in ids if id_ not in barred and texts[id_] not in same and id_ not in found]
        found |= dict.fromkeys(rest[: wanted - len(found)])
    return list(found)
