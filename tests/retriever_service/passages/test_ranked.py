"""Rankings: best first, equal scores by row, empty places last."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.passages.ranked import NO_ROW, Ranked

CANDIDATES = st.dictionaries(st.integers(0, 30), st.integers(-3, 3), max_size=12)


def ranked(candidates: dict[int, int], depth: int, empty: int = 0) -> list[tuple[int, float]]:
    """One line of `Ranked.best`, `empty` places without a row among the candidates."""
    rows = [NO_ROW] * empty + list(candidates)
    scores = [9.0] * empty + list(candidates.values())
    best = Ranked.best(np.array([scores], dtype=np.float32), np.array([rows], dtype=np.int64), depth)
    assert best.rows.shape == best.scores.shape == (1, depth)
    return list(zip(best.rows[0].tolist(), best.scores[0].tolist(), strict=True))


@given(CANDIDATES, st.integers(1, 15), st.integers(0, 3))
def test_best_are_sorted_by_score_then_row_and_the_rest_is_empty(
    candidates: dict[int, int], depth: int, empty: int
) -> None:
    expected = sorted(candidates.items(), key=lambda item: (-item[1], item[0]))[:depth]
    padding = [(NO_ROW, -np.inf)] * (depth - len(expected))
    assert ranked(candidates, depth, empty) == expected + padding


def test_row_with_a_score_of_minus_infinity_is_no_candidate() -> None:
    best = Ranked.best(np.array([[-np.inf, 1.0]]), np.array([[3, 4]]), 2)
    assert best.rows.tolist() == [[4, NO_ROW]]


def test_result_has_the_types_that_every_stage_expects() -> None:
    best = Ranked.best(np.array([[1.0]]), np.array([[3]], dtype=np.int32), 1)
    assert (best.scores.dtype, best.rows.dtype) == (np.float32, np.int64)


def test_no_queries_give_no_lines() -> None:
    assert Ranked.best(np.empty((0, 4)), np.empty((0, 4), dtype=np.int64), 2).rows.shape == (0, 2)


@given(CANDIDATES, st.integers(1, 15), st.integers(1, 15))
def test_top_of_a_deep_ranking_is_the_shallow_one(
    candidates: dict[int, int], deep: int, shallow: int
) -> None:
    rows, scores = (
        np.array([list(candidates)], dtype=np.int64),
        np.array([list(candidates.values())], dtype=float),
    )
    expected = Ranked.best(scores, rows, min(shallow, deep)).rows[0].tolist()
    top = Ranked.best(scores, rows, deep).top(shallow).rows[0].tolist()
    assert top == expected + [NO_ROW] * (shallow - len(expected))
