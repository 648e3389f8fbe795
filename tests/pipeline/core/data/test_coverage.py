"""Evidence coverage: which questions have what they need in the corpus."""

from __future__ import annotations

import pytest

from pipeline.core.data.coverage import coverage_of
from pipeline.core.records import Hop, Question
from retriever_service.passages.corpus import Passage

PASSAGES = [
    Passage("p1", "Silver Harp", "The Silver Harp is made by Orvane."),
    Passage("p2", "Orvane", "Orvane was founded by Mara Velin, in 1984\u20131986."),
    Passage("p3", "Café Trel", "Beyonce\u0301 sang here. It is the second of two cafés."),
]


def holds(*answers: str) -> bool:
    coverage = coverage_of({"dev": [Question("q", "?", answers)]}, PASSAGES)["dev"]
    assert coverage.covered == coverage.answer_found
    return coverage.covered == 1


@pytest.mark.parametrize(
    "answer",
    [
        "Orvane",
        "mara velin",
        "The Silver Harp",
        "1984-1986",
        "Beyonc\u00e9",
        "caf\u00e9 trel",
        "Mara Velin, in",
        "a second",
    ],
)
def test_an_answer_is_found_however_it_is_written(answer: str) -> None:
    assert holds(answer)


@pytest.mark.parametrize(
    "answer", ["Mara", "Velin in Trel", "Orva", "Harp The", "Harp Orvane", "198", "Trel Beyonc\u00e9"]
)
def test_only_whole_words_in_their_order_within_one_field_are_an_answer(answer: str) -> None:
    assert holds(answer) == (answer == "Mara")


def test_one_of_several_answers_is_enough() -> None:
    assert holds("Nobody", "Orvane")


def test_a_question_is_covered_by_all_its_gold_passages_or_by_an_answer() -> None:
    questions = [
        Question("all gold", "?", ("Nobody",), supporting_ids=("p1", "p2")),
        Question("some gold", "?", ("Nobody",), supporting_ids=("p1", "p9")),
        Question("some gold, answer", "?", ("Orvane",), supporting_ids=("p1", "p8")),
        Question("gold of steps", "?", ("yes",), decomposition=(Hop("?", "x", supporting_id="p3"),)),
        Question("answer", "?", ("Mara Velin",)),
        Question("nothing", "?", ("Nobody",)),
        Question("not to be judged", "?", ("No", "yes.")),
    ]
    coverage = coverage_of({"dev": questions}, PASSAGES)["dev"]
    assert (coverage.questions, coverage.judged, coverage.covered) == (7, 6, 4)
    assert (coverage.with_gold, coverage.gold_found, coverage.answer_found) == (4, 2, 2)
    assert coverage.missing_gold == ("p8", "p9")
    assert coverage.percent == pytest.approx(100 * 4 / 6)
    assert coverage.as_json()["percent"] == coverage.percent


def test_sets_are_covered_each_for_itself_in_one_pass() -> None:
    found = coverage_of(
        {
            "train": [Question("a", "?", ("Orvane",))],
            "dev": [Question("b", "?", ("Orvane",)), Question("c", "?", ("x",))],
        },
        iter(PASSAGES),
    )
    assert (found["train"].percent, found["dev"].percent) == (100.0, 50.0)


def test_without_a_question_to_judge_there_is_no_percentage() -> None:
    assert coverage_of({"dev": [Question("q", "?", ("yes",))]}, PASSAGES)["dev"].percent is None
