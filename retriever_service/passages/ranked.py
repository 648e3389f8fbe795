"""Rankings as arrays: what first stages give, and what fusion and merging take.

Guarantees of every `Ranked`:
- best first, equal scores in row order;
- a place without a row has row -1 and score -inf, and is behind all places that have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
"""[rows of the corpus], True for those that may come."""

NO_ROW = -1
NO_SCORE = -np.inf


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The best rows of every query."""

    scores: Scores
    """[queries, depth]."""
    rows: Rows
    """[queries, depth]; rows of the corpus."""

    @classmethod
    def best(cls, scores: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], depth: int) -> Ranked:
        """The best `depth` of candidates in any order.

        Args:
            scores, rows: [queries, candidates]; no row twice in one line. A negative row, or a score of -inf, is
                no candidate.
        """
        found = (rows >= 0) & (scores > NO_SCORE)
        all_scores = np.where(found, scores, NO_SCORE).astype(np.float32)
        all_rows = np.where(found, rows, NO_ROW).astype(np.int64)
        order = np.lexsort((all_rows, -all_scores), axis=-1)
        return cls(np.take_along_axis(all_scores, order, -1), np.take_along_axis(all_rows, order, -1)).top(
            depth
        )

    def top(self, depth: int) -> Ranked:
        """The first `depth` places; those that this ranking does not have are empty."""
        missing = ((0, 0), (0, max(0, depth - self.rows.shape[1])))
        return Ranked(
            np.pad(self.scores[:, :depth], missing, constant_values=NO_SCORE),
            np.pad(self.rows[:, :depth], missing, constant_values=NO_ROW),
        )


class FirstStage(Protocol):
    """Finds candidates in the whole corpus."""

    def search(self, queries: Sequence[str], depth: int, allowed: Mask | None) -> Ranked:
        """The best `depth` rows of each query.

        Args:
            allowed: [rows of the corpus], True for those that may come; None for all.
        """
        ...
