"""Hard negatives: what is taken, what is left out as likely relevant, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.benchmarks.queries import Query
from pipeline.core.encoders.mining import Mined, mine

TEXTS = {f"t{n}": f"tool {n}" for n in range(12)}
RANKING = [(f"t{n}", 1.0 - n / 10) for n in range(8)]


def mined(gold: dict[str, int], margin: float | None, negatives: int = 3, **texts: str) -> Mined:
    query = Query("q", "?", "", gold)
    return mine([query], [RANKING], TEXTS | texts, negatives=negatives, margin=margin, seed=0)


def test_what_scores_above_the_positive_less_the_margin_is_left_out_and_counted() -> None:
    found = mined({"t2": 1}, margin=0.0)
    assert found.pairs[0].negatives == ("t3", "t4", "t5")
    assert (found.left_out, found.filled) == (2, 0)
    assert mined({"t2": 1}, margin=0.15).pairs[0].negatives == ("t4", "t5", "t6")


def test_without_a_margin_the_hardest_are_taken() -> None:
    found = mined({"t2": 1}, margin=None)
    assert found.pairs[0].negatives == ("t0", "t1", "t3") and found.left_out == 0


def test_each_relevant_tool_makes_a_row_and_is_no_negative_of_the_others() -> None:
    found = mined({"t0": 1, "t3": 2, "t5": 0}, margin=0.0)
    assert [(pair.positive, pair.negatives) for pair in found.pairs] == [
        ("t0", ("t1", "t2", "t4")),
        ("t3", ("t4", "t5", "t6")),
    ]
    assert found.left_out == 2


def test_a_copy_of_the_relevant_tool_is_no_negative() -> None:
    assert mined({"t2": 1}, margin=0.0, t3="tool 2").pairs[0].negatives == ("t4", "t5", "t6")


def test_what_the_candidates_lack_is_filled_with_others_that_are_not_suspected() -> None:
    found = mined({"t7": 1}, margin=0.0)
    assert (found.left_out, found.filled) == (7, 3)
    assert set(found.pairs[0].negatives) < {"t8", "t9", "t10", "t11"}
    unranked = mined({"t9": 1}, margin=0.0)
    assert (unranked.left_out, unranked.filled) == (8, 3)
    assert set(unranked.pairs[0].negatives) == {"t8", "t10", "t11"}


def test_a_row_for_which_there_are_too_few_is_left_out_and_counted() -> None:
    found = mined({"t9": 1, "t0": 1}, margin=0.0, negatives=4)
    assert [pair.positive for pair in found.pairs] == ["t0"] and found.too_few == 1


def test_a_relevant_tool_that_is_not_there_is_counted() -> None:
    found = mined({"t2": 1, "gone": 1}, margin=0.0)
    assert len(found.pairs) == 1 and found.not_there == 1


ids = st.sampled_from(list(TEXTS))
scores = st.floats(-1, 1).map(lambda value: round(value, 2))


@given(
    st.dictionaries(ids, scores, max_size=12),
    st.dictionaries(ids, st.integers(0, 2), min_size=1, max_size=4),
    st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.5])),
    st.integers(1, 5),
)
def test_no_negative_is_relevant_suspected_or_there_twice(
    ranking: dict[str, float], gold: dict[str, int], margin: float | None, negatives: int
) -> None:
    ordered = sorted(ranking.items(), key=lambda item: -item[1])
    query = Query("q", "?", "", gold)
    arguments: Any = {"negatives": negatives, "margin": margin, "seed": 0}
    found = mine([query], [ordered], TEXTS, **arguments)
    assert found == mine([query], [ordered], TEXTS, **arguments)
    assert len(found.pairs) + found.too_few == len(query.relevant)
    for pair in found.pairs:
        assert len(pair.negatives) == len(set(pair.negatives)) == negatives
        assert not set(pair.negatives) & set(query.relevant)
        if margin is not None and pair.positive in ranking:
            bound = ranking[pair.positive] - margin
            assert all(ranking[id_] <= bound for id_ in pair.negatives if id_ in ranking)


@pytest.mark.parametrize("margin", [0.0, None])
def test_the_hardest_come_first(margin: float | None) -> None:
    scores_of = dict(RANKING)
    (pair,) = mined({"t1": 1}, margin=margin, negatives=5).pairs
    found = [scores_of[id_] for id_ in pair.negatives]
    assert found == sorted(found, reverse=True)
