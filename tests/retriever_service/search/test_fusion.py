"""Reciprocal-rank fusion: the published formula, whatever the rankings' scores."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.passages.ranked import NO_ROW, Ranked
from retriever_service.search.fusion import reciprocal_rank_fusion

LINE = st.lists(st.integers(0, 12), unique=True, max_size=6)


def ranking(*lines: list[int], depth: int = 6) -> Ranked:
    """Rows as given, best first, empty places behind them."""
    padded = [line + [NO_ROW] * (depth - len(line)) for line in lines]
    rows = np.array(padded, dtype=np.int64).reshape(len(lines), depth)
    return Ranked(np.where(rows >= 0, -np.arange(depth), -np.inf).astype(np.float32), rows)


def found(fused: Ranked, query: int = 0) -> list[int]:
    return [row for row in fused.rows[query].tolist() if row != NO_ROW]


@given(st.lists(LINE, min_size=1, max_size=3), st.integers(1, 100))
def test_order_and_scores_are_those_of_the_formula(lines: list[list[int]], k: int) -> None:
    exact: dict[int, Fraction] = {}
    for line in lines:
        for rank, row in enumerate(line, start=1):
            exact[row] = exact.get(row, Fraction(0)) + Fraction(1, k + rank)
    expected = {row: np.float32(float(score)) for row, score in exact.items()}
    fused = reciprocal_rank_fusion([ranking(line) for line in lines], k)
    assert found(fused) == sorted(expected, key=lambda row: (-expected[row], row))
    assert fused.scores[0, : len(expected)] == pytest.approx([expected[row] for row in found(fused)])


@given(st.lists(st.tuples(LINE, LINE), min_size=1, max_size=4))
def test_queries_are_fused_each_for_itself(queries: list[tuple[list[int], list[int]]]) -> None:
    together = reciprocal_rank_fusion([ranking(*lines) for lines in zip(*queries, strict=True)])
    for number, (first, second) in enumerate(queries):
        alone = reciprocal_rank_fusion([ranking(first), ranking(second)])
        assert together.rows[number].tolist() == alone.rows[0].tolist()
        assert together.scores[number].tolist() == alone.scores[0].tolist()


def test_rankings_may_be_of_different_depth() -> None:
    fused = reciprocal_rank_fusion([ranking([1], depth=1), ranking([2, 1, 3], depth=3)])
    assert found(fused) == [1, 2, 3]


def test_two_empty_rankings_give_an_empty_one() -> None:
    assert found(reciprocal_rank_fusion([ranking([]), ranking([])])) == []


def test_no_queries_give_no_lines() -> None:
    assert reciprocal_rank_fusion([ranking(), ranking()]).rows.shape == (0, 12)
