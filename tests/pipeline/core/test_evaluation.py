"""Evaluations, with hand-computed values."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.core.evaluation import evaluate
from pipeline.core.records import Question, Step, StopReason, Trajectory
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


def question(id_: str, **fields: Any) -> Question:
    return Question(**{"id": id_, "text": f"Question {id_}?", "answers": (f"Answer {id_}",), **fields})


def trajectory(
    id_: str, answer: str = "", found: tuple[str, ...] = (), reason: StopReason = StopReason.ANSWERED
) -> Trajectory:
    """`found` holds one string of space-separated passage ids per search."""
    steps = [Step("q", tuple(Hit(Passage(p, "", "text"), 1.0) for p in ids.split())) for ids in found]
    return Trajectory(
        question_id=id_,
        sample=0,
        policy_version=0,
        token_ids=np.zeros(1, dtype=np.int32),
        loss_mask=np.zeros(1, dtype=np.bool_),
        logprobs=np.zeros(1, dtype=np.float32),
        answer_start=1,
        steps=tuple(steps),
        answer=answer,
        stop_reason=reason,
    )


QUESTIONS = [
    question("1", supporting_ids=("a", "b"), hops=2, type="bridge"),
    question("2", supporting_ids=("c",), hops=1, type="single"),
    question("3", hops=2, type="bridge"),
    question("4", supporting_ids=("d", "e")),
]
TRAJECTORIES = [
    trajectory("1", "Answer 1", ("a x", "x y", "b")),
    trajectory("2", "wrong", ("c",)),
    trajectory("3", "", reason=StopReason.ENGINE_ERROR),
]


def test_every_question_counts_also_failed_and_missing_ones() -> None:
    result = evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=0)
    assert (result["n"], result["em"], result["accuracy"]) == (4, 25.0, 25.0)
    assert result["searches"] == 1.0
    assert result["stop_reasons"]["answered"] == 2
    assert result["stop_reasons"]["engine_error"] == 1
    assert result["stop_reasons"]["missing"] == 1
    assert result["stop_reasons"]["malformed"] == 0


def test_the_protocol_says_which_answers_are_right() -> None:
    dash = [question("1", answers=("1914-1918",))], [trajectory("1", "1914\u20131918")]
    assert evaluate(*dash, bootstrap_samples=0)["em"] == 100.0
    assert evaluate(*dash, bootstrap_samples=0, protocol="kilt")["em"] == 0.0


def test_gold_recall_accumulates_over_the_searches_and_holds_where_a_trajectory_stopped() -> None:
    result = evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=0)
    assert result["gold_recall"] == pytest.approx(100 * (1 + 1 + 0) / 3)
    assert result["gold_recall_by_step"] == pytest.approx([50.0, 50.0, 200 / 3])
    assert result["all_gold"] == pytest.approx(200 / 3)


def test_break_downs_leave_out_questions_without_the_label() -> None:
    result = evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=0)
    assert {hops: group["n"] for hops, group in result["by_hops"].items()} == {"1": 1, "2": 2}
    assert result["by_hops"]["2"]["em"] == 50.0
    single = result["by_type"]["single"]
    assert (single["n"], single["em"], single["f1"], single["accuracy"]) == (1, 0.0, 0.0, 0.0)
    assert single["gold_recall"] == 100.0
    assert set(result["by_type"]) == {"bridge", "single"}


def test_without_supporting_passages_recall_is_null_not_zero() -> None:
    result = evaluate([question("3")], [trajectory("3", "Answer 3")], bootstrap_samples=0)
    assert result["gold_recall"] is None
    assert result["all_gold"] is None
    assert result["gold_recall_by_step"] == []
    assert result["em"] == 100.0


def test_with_passages_without_ids_recall_is_null_for_all_questions() -> None:
    nameless = Hit(Passage("", "", "text"), 1.0)
    trajectories = [replace(TRAJECTORIES[0], steps=(Step("q", (nameless,)),)), *TRAJECTORIES[1:]]
    result = evaluate(QUESTIONS, trajectories, bootstrap_samples=0)
    assert result["gold_recall"] is result["all_gold"] is result["by_hops"]["1"]["gold_recall"] is None
    assert result["gold_recall_by_step"] == []
    assert result["em"] == 25.0


def test_intervals_enclose_the_score_and_repeat_with_the_seed() -> None:
    questions = [question(str(i)) for i in range(200)]
    trajectories = [trajectory(str(i), f"Answer {i if i % 2 else 'no'}") for i in range(200)]
    result = evaluate(questions, trajectories, bootstrap_samples=400, seed=1)
    low, high = result["em_interval"]
    assert low < result["em"] < high
    # Normal approximation: 1.96 * sqrt(0.25 / 200) = 6.9 points on either side.
    assert high - low == pytest.approx(13.9, abs=2.5)
    assert result == evaluate(questions, trajectories, bootstrap_samples=400, seed=1)
    assert result["f1_interval"] != evaluate(questions, trajectories, 400, seed=2)["f1_interval"]


def test_without_bootstrap_samples_only_f1_has_no_interval() -> None:
    for scores in (
        result := evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=0),
        *result["by_type"].values(),
    ):
        assert scores["f1_interval"] is None
        assert scores["em_interval"] == scores["accuracy_interval"] != [0.0, 0.0]


def test_none_right_is_an_interval_and_not_worse_than_three_of_seventeen() -> None:
    questions = [question(f"a{i}", type="before") for i in range(17)]
    questions += [question(f"b{i}", type="after") for i in range(17)]
    trajectories = [trajectory(q.id, q.answers[0] if q.id in ("a1", "a2", "a3") else "no") for q in questions]
    by_type = evaluate(questions, trajectories, bootstrap_samples=200)["by_type"]
    for metric in ("em", "f1", "accuracy"):
        low, high = by_type["before"][f"{metric}_interval"]
        assert low < by_type["before"][metric] < high
        assert by_type["after"][f"{metric}_interval"] == [0.0, pytest.approx(18.4, abs=0.1)]
        assert low < 18.4 < high


def test_the_result_is_plain_json() -> None:
    result = evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=10)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_evaluations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        evaluate([], [])
    with pytest.raises(ValueError, match="several"):
        evaluate(QUESTIONS, [TRAJECTORIES[0], TRAJECTORIES[0]])
    with pytest.raises(ValueError, match="not evaluated"):
        evaluate(QUESTIONS, [trajectory("unknown")])


def test_selections_are_judged_where_they_had_a_supporting_passage_to_choose_from() -> None:
    first, second, third = TRAJECTORIES[0].steps
    assert evaluate(QUESTIONS, TRAJECTORIES, bootstrap_samples=0)["gold_first"] is None
    # "a x" names a, "x y" has no gold passage, "b" is named; and of question 2 "c x" names x.
    selecting = (
        replace(first, selected=(0, 1)),
        replace(second, selected=(1,)),
        replace(third, selected=(0,)),
    )
    wrong = trajectory("2", "wrong", ("c x",))
    trajectories = [
        replace(TRAJECTORIES[0], steps=selecting),
        replace(wrong, steps=(replace(wrong.steps[0], selected=(1, 0)),)),
    ]
    assert evaluate(QUESTIONS, trajectories, bootstrap_samples=0)["gold_first"] == pytest.approx(200 / 3)


def test_calls_of_actions_are_no_searches() -> None:
    (first, *others) = TRAJECTORIES[0].steps
    call = Step("1 + 1", action="calculate", result="2")
    calling = [replace(TRAJECTORIES[0], steps=(call, first, call, *others)), *TRAJECTORIES[1:]]
    before, after = (evaluate(QUESTIONS, rows, bootstrap_samples=0) for rows in (TRAJECTORIES, calling))
    assert before == after
