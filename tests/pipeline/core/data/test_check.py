"""What `exsearch data check` counts: leaks by wording, doubles, and evidence that is missing."""

from __future__ import annotations

import json

from pipeline.core.data.check import check_corpus, check_questions, warnings_of
from pipeline.core.records import Question
from retriever_service.passages.corpus import Passage


def q(id_: str, text: str, answer: str = "Orvane", *gold: str) -> Question:
    return Question(id_, text, (answer,), supporting_ids=gold)


def test_a_question_that_is_trained_on_and_asked_under_another_id_is_a_leak() -> None:
    train = [q("t1", "Who made the Café\u2019s harp?"), q("t2", "Where?")]
    dev = [q("d1", "who made the  Cafe\u0301's harp"), q("d2", "When?")]
    found = check_questions({"train": train, "dev": dev, "test": [q("x1", "Where")]})
    assert found["leaks"]["dev"] == {"questions": 1, "examples": [("t1", "d1")]}
    assert found["leaks"]["test"] == {"questions": 1, "examples": [("t2", "x1")]}
    assert warnings_of(found)[0] == (
        "1 questions of dev are also in train, in the same words under other ids (t1 and d1); take them out of one of "
        "the two"
    )


def test_questions_that_only_the_cold_start_learns_from_leak_as_well() -> None:
    found = check_questions({"train": [], "dev": [q("d1", "Who?")]}, apart=[q("c1", "Who?")])
    assert found["leaks"]["dev"]["examples"] == [("c1", "d1")]


def test_a_question_that_comes_again_in_its_set_is_counted() -> None:
    found = check_questions({"train": [q("a", "Who?"), q("b", "Where?"), q("c", "who")]})
    assert found["repeated"]["train"] == {"questions": 1, "examples": [("a", "c")]}


def test_passages_that_say_the_same_are_counted_but_not_those_that_a_union_unites() -> None:
    passages = [
        Passage("1", "T", "One text."),
        Passage("2", "", "Another."),
        Passage("3", "T", "one  text"),
        Passage("1", "T", "One text."),
        Passage("4", "T", "One text!"),
    ]
    found = check_corpus({"dev": [q("d", "Who?")]}, lambda: passages)["passages"]
    assert (found["passages"], found["duplicates"]) == (4, 2)
    assert {frozenset(pair) for pair in found["examples"]} <= {
        frozenset(pair) for pair in (("1", "3"), ("1", "4"), ("3", "4"))
    }


def test_evidence_that_is_missing_is_said_with_its_ids() -> None:
    passages = [Passage("p1", "", "Nothing of it.")]
    found = check_questions({"dev": [q("d", "Who?", "Orvane", "p1", "p7")]})
    found |= check_corpus({"dev": [q("d", "Who?", "Orvane", "p1", "p7")]}, lambda: passages)
    assert warnings_of(found) == [
        "1 questions of dev name gold passages that the corpus does not have (p7)",
        "1 of 1 questions of dev have neither their gold passages nor an answer in the corpus: no retriever can find "
        "the evidence",
    ]
    assert json.loads(json.dumps(found))["coverage"]["dev"]["percent"] == 0.0


def test_where_all_is_well_there_is_nothing_to_say() -> None:
    sets = {"train": [q("a", "Who?")], "dev": [q("b", "Where?")]}
    found = check_questions(sets) | check_corpus(sets, lambda: [Passage("1", "", "Orvane")])
    assert warnings_of(found) == []


def test_progress_is_told_to_the_end() -> None:
    told: list[int] = []
    check_corpus(
        {"dev": [q("a", "?")]}, lambda: (Passage(str(i), "", str(i)) for i in range(2500)), told.append
    )
    assert told == [1000, 2000, 2500]
