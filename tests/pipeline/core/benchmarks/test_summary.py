"""Means over tasks, domains and queries; what instructions change; intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.benchmarks.summary import summarise

shares = st.integers(0, 4).map(lambda n: n / 4)
pairs = st.lists(st.tuples(shares, shares), min_size=1, max_size=6)
tables = st.dictionaries(st.sampled_from("abcde"), pairs, min_size=1)


def values_of(table: dict[str, list[tuple[float, float]]]) -> Any:
    return {
        task: {
            "without": {"ndcg@10": [pair[0] for pair in of]},
            "with": {"ndcg@10": [pair[1] for pair in of]},
        }
        for task, of in table.items()
    }


def summary(table: dict[str, list[tuple[float, float]]], domains: dict[str, str]) -> Any:
    return summarise(values_of(table), domains, ["ndcg@10"], samples=50, seed=0)


def test_a_domain_is_the_mean_of_its_tasks_and_the_mean_of_queries_is_another_one() -> None:
    """Two tasks of unlike size in one domain, one task in another."""
    table = {"a": [(1.0, 1.0)], "b": [(0.0, 1.0)] * 3, "c": [(0.5, 0.5)] * 4}
    found = summary(table, {"a": "web", "b": "web", "c": "code"})
    without = {name: of["without"]["ndcg@10"] for name, of in found["means"].items()}
    assert found["domains"]["web"]["without"]["ndcg@10"] == 50
    assert without == {"tasks": 50, "domains": 50, "queries": pytest.approx(100 * 3 / 8)}
    assert found["means"]["domains"]["with"]["ndcg@10"] == 75
    assert found["means"]["queries"]["with"]["queries"] == 8


def test_tasks_that_gain_lose_and_stay_are_counted() -> None:
    table = {
        "a": [(0.0, 1.0)] * 20,
        "b": [(1.0, 0.0)] * 20,
        "c": [(0.5, 0.5)],
        "d": [(0.25, 0.5), (0.5, 0.5)],
    }
    gains = summary(table, dict.fromkeys(table, "all"))["gains"]
    assert gains == {"tasks": 4, "gained": 2, "lost": 1, "equal": 1, "gained_surely": 1, "lost_surely": 1}


def test_a_task_without_instructions_takes_no_part_in_the_difference() -> None:
    values = values_of({"a": [(0.0, 1.0)], "b": [(1.0, 1.0)]})
    del values["b"]["with"]
    found = summarise(values, {"a": "web", "b": "web"}, ["ndcg@10"], samples=20, seed=0)
    assert found["means"]["tasks"]["without"]["tasks"] == 2
    assert found["means"]["tasks"]["with"]["tasks"] == found["means"]["tasks"]["difference"]["tasks"] == 1
    assert found["means"]["tasks"]["difference"]["difference"] == 100
    assert "difference" not in found["tasks"]["b"]
    del values["a"]["with"]
    assert summarise(values, {"a": "web", "b": "web"}, ["ndcg@10"], samples=20, seed=0)["gains"] is None


@settings(max_examples=30)
@given(tables, st.lists(st.sampled_from(["x", "y", "z"]), min_size=5, max_size=5))
def test_means_are_those_of_plain_arithmetic(table: Any, names: list[str]) -> None:
    domains = dict(zip("abcde", names, strict=True))
    found = summary(table, domains)
    for arm, place in (("without", 0), ("with", 1)):
        task_means = {task: np.mean([pair[place] for pair in of]) for task, of in table.items()}
        by_domain = [[task_means[t] for t in table if domains[t] == d] for d in {domains[t] for t in table}]
        expected = {
            "tasks": np.mean(list(task_means.values())),
            "domains": np.mean([np.mean(of) for of in by_domain]),
            "queries": np.mean([pair[place] for of in table.values() for pair in of]),
        }
        for name, mean in expected.items():
            assert found["means"][name][arm]["ndcg@10"] == pytest.approx(100 * mean)
    for kind in ("tasks", "domains", "means"):
        for of in found[kind].values():
            assert of["difference"]["difference"] == pytest.approx(
                of["with"]["ndcg@10"] - of["without"]["ndcg@10"]
            )
            for arm in ("without", "with"):
                low, high = of[arm]["interval"]
                assert -1e-9 <= low <= high <= 100 + 1e-9


def test_an_interval_of_a_mean_of_tasks_is_narrower_than_those_of_its_tasks() -> None:
    rng = np.random.default_rng(0)
    table = {task: [(float(x), float(y)) for x, y in rng.random((40, 2))] for task in "abcd"}
    found = summarise(values_of(table), dict.fromkeys(table, "all"), ["ndcg@10"], samples=400, seed=0)
    width = [high - low for low, high in (of["without"]["interval"] for of in found["tasks"].values())]
    low, high = found["means"]["tasks"]["without"]["interval"]
    # Independent samples: about a half for four tasks of the same size.
    assert 0.35 * np.mean(width) < high - low < 0.65 * np.mean(width)
