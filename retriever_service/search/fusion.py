"""One ranking out of several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retriever_service.passages.ranked import NO_ROW, NO_SCORE, Ranked


def reciprocal_rank_fusion(rankings: Sequence[Ranked], k: int = 60) -> Ranked:
    """The union of rankings of the same queries, by the sum of 1 / (k + rank), ranks from 1.

    Looks at ranks only, so that scores of different scales go together. Nothing that a ranking found is lost: the
    result is as deep as all of them together. Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    rows = np.concatenate([ranking.rows for ranking in rankings], axis=1)
    shares = np.concatenate(
        [np.broadcast_to(1 / (k + 1 + np.arange(r.rows.shape[1])), r.rows.shape) for r in rankings], axis=1
    )
    if rows.size == 0:
        return Ranked.best(shares, rows, rows.shape[1])
    order = np.argsort(rows, axis=1, kind="stable")
    rows = np.take_along_axis(rows, order, axis=1)
    shares = np.take_along_axis(shares, order, axis=1)
    # Equal rows are neighbours now: every run of them becomes one candidate, at the place of its first.
    first = np.ones(rows.shape, dtype=bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    totals = np.full(rows.shape, NO_SCORE)
    totals[first] = np.add.reduceat(shares.ravel(), np.flatnonzero(first))
    return Ranked.best(totals, np.where(first, rows, NO_ROW), rows.shape[1])
