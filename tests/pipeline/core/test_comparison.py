"""Evaluations beside each other: what is told of a pair, of all models of a run, and of the choice among iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.comparison import compare, compare_metrics, pair_up, paired_tests, selection
from pipeline.core.errors import UserError
from pipeline.core.question_scores import Scores
from pipeline.core.scoring.paired import compare_means, mcnemar
from tests.pipeline.scores_support import questions, write_evaluation

NAMES = ("A", "B")


@pytest.fixture
def evaluation(tmp_path: Path) -> Any:
    def make(right: str, asked: Any = None) -> Scores:
        return write_evaluation(tmp_path / "e.parquet", asked or questions(len(right)), right)

    return make


def test_a_pair_of_evaluations_by_metric_hops_and_type(evaluation: Any) -> None:
    a, b = evaluation("1100h000"), evaluation("01111h0.")
    found = compare(a, pair_up(a, b, NAMES), 500, seed=0)
    em = found["all"]["em"]
    assert (em["n"], em["a"], em["b"], em["difference"]) == (8, 25.0, 50.0, 25.0)
    assert (em["gained"], em["lost"], em["p_value"]) == (3, 1, mcnemar(3, 1))
    f1 = compare_means(a.values["f1"], b.values["f1"], 500, seed=0).in_percent()
    assert found["all"]["f1"] == f1
    assert found["all"]["gold_recall"]["n"] == 7  # the first question names no gold passage
    assert {hops: group["em"]["n"] for hops, group in found["by_hops"].items()} == {"1": 4, "2": 4}
    assert found["by_hops"]["1"]["em"]["gained"] == 2
    assert set(found["by_type"]) == {"bridge"}
    assert found["by_type"]["bridge"]["em"]["n"] == 4


def test_the_questions_that_changed_are_those_of_another_em(evaluation: Any) -> None:
    a, b = evaluation("1100h000"), evaluation("01111h0.")
    changed = compare(a, b, 0, seed=0)["changed"]
    assert [(row["id"], row["change"]) for row in changed] == [
        ("q2", "gained"),
        ("q3", "gained"),
        ("q4", "gained"),
        ("q0", "lost"),
    ]
    assert (changed[2]["a"], changed[2]["b"]) == ("answer of 4", "answer 4")
    assert (changed[2]["question"], changed[2]["gold_answers"]) == ("Who is 4?", ["answer 4", "alias 4"])


def test_without_bootstrap_samples_only_shares_are_tested(evaluation: Any) -> None:
    a, b = evaluation("10"), evaluation("01")
    found = compare_metrics(a, b, 0, seed=0)
    assert found["f1"]["p_value"] is found["f1"]["interval"] is None
    assert found["em"]["p_value"] == 1.0


def test_pairs_are_of_the_same_question_whatever_the_order(evaluation: Any) -> None:
    asked = questions(5)
    a, b = evaluation("11000", asked), evaluation("00011", asked[::-1])
    assert compare(a, pair_up(a, b, NAMES), 0, seed=0)["changed"] == []


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (questions(4), "of 3 and 4 they share 3; 'q3' is only in B"),
        (questions(2), "of 3 and 2 they share 2; 'q2' is only in A"),
        (
            questions(3, world=" elsewhere"),
            "3 of 3 ids name others, say 'q0': 'Who is 0\\?' and 'Who is 0 else",
        ),
    ],
)
def test_evaluations_of_other_questions_are_refused(evaluation: Any, others: Any, message: str) -> None:
    a, b = evaluation("100"), evaluation("1" * len(others), others)
    with pytest.raises(UserError, match=f"A and B do not have the same questions: {message}.*data.seed"):
        pair_up(a, b, NAMES)


def test_every_two_tests_of_a_run_are_compared_the_later_less_the_earlier(evaluation: Any) -> None:
    tests = {"base": evaluation("0000"), "cold_start": evaluation("0011"), "best": evaluation("1111")}
    found = paired_tests(tests, 100, seed=0)
    assert [(row["a"], row["b"], row["em"]["difference"]) for row in found] == [
        ("base", "cold_start", 50.0),
        ("base", "best", 100.0),
        ("cold_start", "best", 50.0),
    ]
    assert found[1]["em"]["p_value"] == 2 / 2**4
    assert found[1]["f1"]["test"] == "bootstrap"


def test_a_test_of_other_questions_is_compared_with_none(evaluation: Any) -> None:
    tests = {"base": evaluation("00"), "best": evaluation("11"), "other": evaluation("111")}
    assert [(row["a"], row["b"]) for row in paired_tests(tests, 0, seed=0)] == [("base", "best")]


def test_how_sure_it_is_that_the_selected_iteration_is_the_best(evaluation: Any) -> None:
    dev = {2: evaluation("11110000"), 0: evaluation("00000000"), 1: evaluation("11101000")}
    found = selection(dev, 1, "em", 4000, seed=0)
    assert found is not None
    assert (found["by"], found["questions"]) == ("em", 8)
    zero, one, two = found["iterations"]
    assert [row["iteration"] for row in found["iterations"]] == [0, 1, 2]
    assert [row["score"] for row in found["iterations"]] == [0.0, 50.0, 50.0]
    assert one["difference"] is one["interval"] is one["p_value"] is None
    assert (zero["difference"], zero["p_value"]) == (-50.0, 2 / 2**4)
    assert (two["difference"], two["p_value"]) == (0.0, 1.0)
    # The two differ on one question each: by symmetry each is drawn more often as frequently, and ties go to 1.
    assert one["probability_best"] > two["probability_best"] > 0.2
    # The one without a right answer is taken only where none of the five questions is drawn that another one has.
    assert zero["probability_best"] == pytest.approx(0.375**8, abs=0.002)
    assert sum(row["probability_best"] for row in found["iterations"]) == pytest.approx(1.0)


def test_the_choice_by_f1_is_tested_by_the_bootstrap(evaluation: Any) -> None:
    dev = {0: evaluation("hhhh"), 1: evaluation("1111")}
    found = selection(dev, 1, "f1", 400, seed=0)
    assert found is not None
    assert found["iterations"][0]["difference"] == pytest.approx(-20.0)
    assert found["iterations"][0]["p_value"] == 0.125  # four questions that all say the same
    without = selection(dev, 1, "f1", 0, seed=0)
    assert without is not None
    assert without["iterations"][0]["probability_best"] is without["iterations"][0]["p_value"] is None


def test_nothing_is_said_of_a_choice_whose_scores_are_not_known(evaluation: Any) -> None:
    assert selection({}, 0, "em", 100, seed=0) is None
    assert selection({1: evaluation("11")}, 0, "em", 100, seed=0) is None
    assert selection({0: evaluation("11"), 1: evaluation("111")}, 0, "em", 100, seed=0) is None


def test_groups_are_told_by_what_a_question_says_of_itself(evaluation: Any) -> None:
    scores = evaluation("1010")
    rows = np.array([True, False, True, False])
    found = compare_metrics(scores, scores, 0, seed=0, metrics=("em",), rows=rows)
    assert list(found) == ["em"]
    assert (found["em"]["n"], found["em"]["a"]) == (2, 100.0)
