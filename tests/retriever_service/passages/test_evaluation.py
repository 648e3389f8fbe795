"""Measures against figures computed by hand, files in and out, and what is refused with its line."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.passages.evaluation import (
    Run,
    evaluate_run,
    read_qrels,
    read_queries,
    read_run,
    write_run,
)
from tests.retriever_service.support import write_jsonl

QRELS = {"q1": {"a": 1, "b": 1, "c": 0}, "q2": {"d": 2}}


def run_of(**answers: str) -> Run:
    """Answers of one-letter passages, best first."""
    return {
        question: [(p, -float(i)) for i, p in enumerate(passages)] for question, passages in answers.items()
    }


def test_measures_are_those_of_the_textbook() -> None:
    values = evaluate_run(QRELS, run_of(q1="xab", q2="zd"), ks=[2, 3])
    ideal = 1 + 1 / math.log2(3)
    ndcg_q1_at_2, ndcg_q1_at_3 = (1 / math.log2(3)) / ideal, (1 / math.log2(3) + 1 / 2) / ideal
    assert values == pytest.approx(
        {
            "ndcg@2": (ndcg_q1_at_2 + 1 / math.log2(3)) / 2,
            "ndcg@3": (ndcg_q1_at_3 + 1 / math.log2(3)) / 2,
            "recall@2": (1 / 2 + 1) / 2,
            "recall@3": 1.0,
            "mrr@2": 1 / 2,
            "mrr@3": 1 / 2,
            "all_gold@2": 1 / 2,
            "all_gold@3": 1.0,
        }
    )


def test_measures_are_plain_numbers_that_json_can_hold() -> None:
    values = evaluate_run(QRELS, run_of(q1="a"), ["ndcg", "all_gold"], [1])
    assert json.loads(json.dumps(values)) == values


def test_relevant_passage_below_k_counts_as_not_found() -> None:
    values = evaluate_run(QRELS, run_of(q1="xyzab", q2="d"), ks=[3])
    assert values["recall@3"] == values["mrr@3"] == values["all_gold@3"] == 0.5


def test_graded_relevance_weighs_in_ndcg_alone() -> None:
    qrels = {"q": {"a": 3, "b": 1}}
    better, worse = (evaluate_run(qrels, run_of(q=order), ks=[2]) for order in ("ab", "ba"))
    assert better.pop("ndcg@2") > worse.pop("ndcg@2")
    assert better == worse


def test_question_that_the_run_does_not_answer_counts_as_0() -> None:
    for run in (run_of(q1="ab"), run_of(q1="ab", q2="")):
        assert set(evaluate_run(QRELS, run, ks=[2]).values()) == {0.5}
    assert set(evaluate_run(QRELS, {}, ks=[2]).values()) == {0.0}


def test_question_without_a_relevant_passage_counts_as_0() -> None:
    assert set(evaluate_run({"q1": {"a": 1}, "q2": {"b": 0}}, run_of(q1="a", q2="b"), ks=[1]).values()) == {
        0.5
    }


def test_question_that_is_a_passage_itself_does_not_find_itself() -> None:
    """As BEIR does with ArguAna and Quora: every question finds itself first."""
    run = run_of(q1="xab", q2="zd")
    for question, answer in run.items():
        answer.insert(0, (question, 9.0))
    assert evaluate_run(QRELS, run, ks=[2]) == evaluate_run(QRELS, run_of(q1="xab", q2="zd"), ks=[2])
    judged_0 = {question: judged | {question: 0} for question, judged in QRELS.items()}
    assert evaluate_run(judged_0, run, ks=[2]) == evaluate_run(QRELS, run_of(q1="xab", q2="zd"), ks=[2])


def test_passage_with_the_id_of_the_question_counts_where_it_is_judged_relevant() -> None:
    """Passages and questions may both be numbered from 1."""
    qrels = {"1": {"1": 1}, "2": {"1": 1}}
    assert evaluate_run(qrels, run_of(**{"1": "1", "2": "21"}), ["mrr"], [1]) == {"mrr@1": 1.0}


def test_order_of_the_run_decides_where_scores_are_equal() -> None:
    for answer, expected in (("az", 1.0), ("za", 0.5)):
        run = {"q": [(passage, 1.0) for passage in answer]}
        assert evaluate_run({"q": {"a": 1}}, run, ["mrr"], [2]) == {"mrr@2": expected}


@given(st.permutations("abcdef"), st.sets(st.sampled_from("abcdef"), min_size=1), st.integers(1, 7))
def test_all_gold_is_whether_recall_is_whole(order: list[str], gold: set[str], k: int) -> None:
    values = evaluate_run(
        {"q": dict.fromkeys(gold, 1)}, run_of(q="".join(order)), ["recall", "all_gold"], [k]
    )
    assert values[f"recall@{k}"] == pytest.approx(len(gold & set(order[:k])) / len(gold))
    assert values[f"all_gold@{k}"] == (gold <= set(order[:k]))


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (
            run_of(q1="a", q8="a", q9="a"),
            {},
            "2 of the 3 questions of the run are not judged, the first is 'q8'",
        ),
        (run_of(q1="aba"), {}, "question 'q1': a passage comes twice"),
        (run_of(q1="a"), {"measures": ["map"]}, "no measure 'map'; known are ndcg, recall, mrr, all_gold"),
        (run_of(q1="a"), {"ks": [0]}, "k at least 1, got 0"),
    ],
)
def test_run_or_measure_that_cannot_be_is_refused(run: Run, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        evaluate_run(QRELS, run, **arguments)


def test_evaluation_without_judgements_is_refused() -> None:
    with pytest.raises(RetrieverError, match="no judged questions"):
        evaluate_run({}, {})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_judgements_of_beir_and_of_trec_are_the_same(tmp_path: Path) -> None:
    expected = {"q1": {"a": 1, "b": 0}, "q2": {"a": 2}}
    beir = ["query-id\tcorpus-id\tscore", "q1\ta\t1", "q1\tb\t0", "", "q2\ta\t2"]
    trec = ["q1 0 a 1", "q1\t0\tb\t0", "q2  0  a  2"]
    assert read_qrels(write(tmp_path / "beir.tsv", *beir)) == expected
    assert read_qrels(write(tmp_path / "trec.qrels", *trec)) == expected


def test_judgement_that_comes_again_is_read_once(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "q", "q1 0 a 1", "q1 0 a 1")) == {"q1": {"a": 1}}


def test_ids_of_beir_may_hold_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "q.tsv", "query-id\tcorpus-id\tscore", "q 1\tNew York\t1")
    assert read_qrels(path) == {"q 1": {"New York": 1}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["query-id\tcorpus-id\tscore", "q1\ta"], r":2: expected query-id<tab>corpus-id<tab>score"),
        (["q1\ta\t1"], ":1: expected .* below a header"),
        (["query-id\tcorpus-id\tscore", "q1\ta\tyes"], ":2: the relevance must be a whole number, got 'yes'"),
        (["q1 0 a 1", "q1 0 b 0.5"], ":2: the relevance must be a whole number, got '0.5'"),
        (["q1 0 a 1", "q1 0 a 0"], ":2: passage 'a' was judged 1 for question 'q1' before, now 0"),
        ([], ": no judgements"),
        (["query-id\tcorpus-id\tscore"], ": no judgements"),
    ],
)
def test_malformed_judgement_is_refused_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(RetrieverError, match=rf"q\.tsv{message}"):
        read_qrels(write(tmp_path / "q.tsv", *lines))


def test_questions_of_both_dialects_are_read_in_order(tmp_path: Path) -> None:
    rows = [{"_id": "2", "text": "who?", "metadata": {}}, {"id": "1", "question": "where?", "answers": []}]
    assert list(read_queries(write_jsonl(tmp_path / "q.jsonl", rows)).items()) == [
        ("2", "who?"),
        ("1", "where?"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2"}', ":2: a question needs an id .* a text .*fields: id"),
        ('{"question": "why?"}', ":2: a question needs an id"),
        ('{"id": true, "question": "why?"}', ":2: a question needs an id .* both not empty"),
        ('{"id": "2", "question": " "}', ":2: a question needs .* not empty"),
        ('{"id": "1", "question": "why?"}', ":2: question '1' appears twice"),
        ('{"id": "2", ', ":2: not valid JSON"),
    ],
)
def test_malformed_question_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RetrieverError, match=rf"q\.jsonl{message}"):
        read_queries(write(tmp_path / "q.jsonl", '{"id": "1", "question": "who?"}', line))


def test_empty_file_of_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="no questions"):
        read_queries(write(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("read", [read_qrels, read_queries, read_run])
def test_missing_file_is_refused(tmp_path: Path, read: Any) -> None:
    with pytest.raises(RetrieverError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [read_qrels, read_queries, read_run])
def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, read: Any) -> None:
    (tmp_path / "f").write_bytes(b"\ncaf\xe9\n")
    with pytest.raises(RetrieverError, match=":2: not valid UTF-8"):
        read(tmp_path / "f")


SCORES = st.floats(-1e6, 1e6, width=32)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answers=st.lists(
        st.lists(SCORES, min_size=1, max_size=8).map(lambda s: sorted(s, reverse=True)),
        min_size=1,
        max_size=3,
    )
)
def test_run_comes_back_from_its_file_in_its_order_with_no_equal_scores(
    tmp_path: Path, answers: list[list[float]]
) -> None:
    run = {
        f"q{i}": [(f"p{9 - j}", score) for j, score in enumerate(scores)] for i, scores in enumerate(answers)
    }
    write_run(run, tmp_path / "run.trec", "test")
    back = read_run(tmp_path / "run.trec")
    assert list(back) == list(run)
    for question, answer in run.items():
        assert [passage for passage, _ in back[question]] == [passage for passage, _ in answer]
        scores = [score for _, score in back[question]]
        assert scores == pytest.approx([score for _, score in answer], rel=1e-5, abs=1e-30)
        assert all(a > b for a, b in pairwise(scores))


def test_run_file_is_what_trec_eval_reads(tmp_path: Path) -> None:
    write_run({"q1": [("a", 2.5), ("b", 2.5)]}, tmp_path / "run.trec", "bm25")
    assert (tmp_path / "run.trec").read_text() == "q1 Q0 a 1 2.5 bm25\nq1 Q0 b 2 2.49999976 bm25\n"


def test_foreign_run_is_ordered_by_score_then_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "r", "q Q0 c 3 1.0 x", "q Q0 b 2 1.0 x", "q Q0 a 1 1.0 x", "q Q0 d 4 7 x")
    assert [passage for passage, _ in read_run(path)["q"]] == ["d", "a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 b 2 1.0", ":2: expected question, Q0, passage, rank, score and tag"),
        ("q Q0 b two 1.0 x", ":2: the rank must be a whole number, got 'two'"),
        ("q Q0 b 2 high x", ":2: the score must be a number, got 'high'"),
        ("q Q0 b 2 nan x", ":2: the score must be a number, got 'nan'"),
        ("q Q0 a 2 1.0 x", ":2: passage 'a' comes twice for question 'q'"),
    ],
)
def test_malformed_run_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RetrieverError, match=f"r{message}"):
        read_run(write(tmp_path / "r", "q Q0 a 1 2.0 x", line))


@pytest.mark.parametrize(
    ("run", "tag"), [(run_of(q="a"), "my run"), ({"q": [("New York", 1.0)]}, "x"), ({"": [("a", 1.0)]}, "x")]
)
def test_run_that_the_format_has_no_place_for_is_not_written(tmp_path: Path, run: Run, tag: str) -> None:
    with pytest.raises(RetrieverError, match="cannot stand in a TREC run"):
        write_run(run, tmp_path / "run.trec", tag)
    assert list(tmp_path.iterdir()) == []
