"""Measures by query against formulas of their own, and against pytrec_eval as ToolRet's program calls it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.benchmarks.cells import measure
from pipeline.core.benchmarks.queries import Query

K = 10
NAMES = [f"{name}@{K}" for name in ("ndcg", "precision", "recall", "all_gold", "mrr")]
ids = [f"p{n}" for n in range(14)]
rankings = st.lists(st.sampled_from(ids), unique=True, max_size=14)
golds = st.dictionaries(st.sampled_from(ids), st.integers(0, 3), min_size=1, max_size=6)


def by_hand(ranking: list[str], gold: dict[str, int]) -> dict[str, float]:
    first = ranking[:K]
    relevant = {id_ for id_, grade in gold.items() if grade > 0}
    gain = sum(gold.get(id_, 0) / math.log2(rank + 2) for rank, id_ in enumerate(first))
    ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(gold.values(), reverse=True)[:K]))
    found = relevant & set(first)
    return {
        "ndcg@10": gain / ideal if ideal else 0.0,
        "precision@10": len(found) / K,
        "recall@10": len(found) / len(relevant) if relevant else 0.0,
        "all_gold@10": float(bool(relevant) and relevant <= set(first)),
        "mrr@10": next((1 / (rank + 1) for rank, id_ in enumerate(first) if id_ in relevant), 0.0),
    }


def measured(ranking: list[str], gold: dict[str, int]) -> dict[str, float]:
    scores = [(id_, -float(place)) for place, id_ in enumerate(ranking)]
    return {name: of[0] for name, of in measure([Query("q", "?", "", gold)], {"q": scores}, NAMES).items()}


@given(rankings, golds)
def test_each_measure_is_its_formula(ranking: list[str], gold: dict[str, int]) -> None:
    assert measured(ranking, gold) == pytest.approx(by_hand(ranking, gold))


@given(rankings.filter(bool), golds)
def test_each_measure_is_that_of_the_released_program(ranking: list[str], gold: dict[str, int]) -> None:
    """pytrec_eval at 10, and completeness where recall is whole."""
    evaluator = pytrec_eval.RelevanceEvaluator({"q": gold}, {"ndcg_cut.10", "P.10", "recall.10"})
    released: dict[str, Any] = evaluator.evaluate({"q": {id_: -float(n) for n, id_ in enumerate(ranking)}})[
        "q"
    ]
    found = measured(ranking, gold)
    assert found["ndcg@10"] == pytest.approx(released["ndcg_cut_10"])
    assert found["precision@10"] == pytest.approx(released["P_10"])
    assert found["recall@10"] == pytest.approx(released["recall_10"])
    assert found["all_gold@10"] == float(released["recall_10"] == 1)


@given(rankings, golds, st.randoms())
def test_bounds_and_what_a_better_rank_does(ranking: list[str], gold: dict[str, int], random: Any) -> None:
    found = measured(ranking, gold)
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())
    assert found["all_gold@10"] <= found["recall@10"]
    relevant = [id_ for id_ in ranking if gold.get(id_, 0) > 0]
    if relevant:
        moved = random.choice(relevant)
        place = ranking.index(moved)
        better = [
            *ranking[: max(0, place - 1)],
            moved,
            *[i for i in ranking[max(0, place - 1) :] if i != moved],
        ]
        after = measured(better, {id_: min(1, grade) for id_, grade in gold.items()})
        before = measured(ranking, {id_: min(1, grade) for id_, grade in gold.items()})
        assert all(after[name] >= before[name] - 1e-9 for name in NAMES)


def test_of_two_relevant_tools_one_is_no_completeness() -> None:
    assert measured(["p0", "p1"], {"p0": 1, "p9": 1})["all_gold@10"] == 0
    assert measured(["p0", "p1"], {"p0": 1, "p1": 1})["all_gold@10"] == 1


def test_a_query_with_the_id_of_a_passage_still_finds_it_or_not() -> None:
    """Both are numbered from 0 in ToolLens."""
    found = measure([Query("3", "?", "", {"5": 1})], {"3": [("3", 2.0), ("5", 1.0)]}, ["mrr@10"])
    assert found == {"mrr@10": [0.5]}
