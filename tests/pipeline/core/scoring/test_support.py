"""Which evidence a trajectory is said to have used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.core.records import Evidence, Paragraph, Question, Step, StopReason, Trajectory
from pipeline.core.scoring.support import predict
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

HARP = Passage("p1", "Silver Harp", "The Silver Harp is a harp. It is made by Orvane. It has 47 strings.")
ORVANE = Passage("p2", "Orvane", "Orvane makes harps. Mara Velin founded it in 1950.")
TREL = Passage("p3", "Trel", "Trel is a town. Orvane is there.")
CONTEXT = (
    Paragraph("Trel", ("Trel is a town.",)),
    Paragraph("Orvane", ("It is in Trel.", " Orvane makes harps and Mara Velin founded it in 1950.")),
    Paragraph("silver harp", ("The Silver Harp is a harp.", " It is made by Orvane.", " It has 47 strings.")),
)


def question(**evidence: Any) -> Question:
    return Question("q", "Who founded the maker?", ("Mara Velin",), evidence=Evidence(**evidence))


def trajectory(*steps: tuple[str, tuple[Passage, ...]], answer: str = "Mara Velin") -> Trajectory:
    """`steps` hold a record and what was found."""
    return Trajectory(
        question_id="q",
        sample=0,
        policy_version=0,
        token_ids=np.zeros(1, dtype=np.int32),
        loss_mask=np.zeros(1, dtype=np.bool_),
        logprobs=np.zeros(1, dtype=np.float32),
        answer_start=1,
        steps=tuple(Step("?", tuple(Hit(p, 1.0) for p in found), record) for record, found in steps),
        answer=answer,
        stop_reason=StopReason.ANSWERED,
    )


TWO_STEPS = trajectory(
    ("Silver Harp: It is made by Orvane.", (TREL, HARP)),
    ("Mara Velin founded Orvane in 1950.", (HARP, TREL, ORVANE)),
)


def test_facts_are_the_sentences_that_the_records_were_taken_from_as_the_row_counts_them() -> None:
    found = predict(question(context=CONTEXT), TWO_STEPS)
    assert found.answer == "Mara Velin"
    assert found.facts == {("silver harp", 1), ("Orvane", 1)}
    assert found.paragraphs == {1, 2}


def test_without_a_row_facts_are_counted_in_the_passage_itself() -> None:
    found = predict(question(), TWO_STEPS)
    assert found.facts == {("Silver Harp", 1), ("Orvane", 1)}
    assert found.paragraphs == frozenset()


def test_paragraphs_are_known_by_their_ids_or_among_equal_titles_by_their_words() -> None:
    by_id = (Paragraph("", (), "p9"), Paragraph("", (), "p2"))
    assert predict(question(context=by_id), TWO_STEPS).paragraphs == {1}
    doubles = (Paragraph("Orvane", ("A river.",)), Paragraph("Orvane", (ORVANE.text,)))
    assert predict(question(context=doubles), TWO_STEPS).paragraphs == {1}


def test_a_record_that_is_in_no_passage_and_a_step_without_a_record_name_none() -> None:
    said = trajectory(("Nobody knows whoever did this, sadly.", (HARP,)), ("", (ORVANE,)))
    found = predict(question(context=CONTEXT), said)
    assert (found.facts, found.paragraphs) == (frozenset(), frozenset())


def test_each_sentence_of_a_record_has_its_own_source() -> None:
    said = trajectory(("Trel is a town. Mara Velin founded it in 1950.", (ORVANE, TREL)))
    assert predict(question(), said).facts == {("Trel", 0), ("Orvane", 1)}


def test_pages_begin_with_those_that_were_used_and_have_their_wikipedia_id() -> None:
    paged = Passage("p2", "Orvane", ORVANE.text, {"wikipedia_id": 77})
    said = trajectory(("Mara Velin founded it in 1950.", (TREL, paged)), ("", (HARP,)))
    assert predict(question(), said).pages == ("77", "p3", "p1")


def test_a_trajectory_without_an_answer_has_none() -> None:
    assert predict(question(), trajectory(answer="")).answer is None


def test_a_record_comes_from_the_passages_that_were_selected() -> None:
    record, found = "Orvane makes harp strings.", (HARP, ORVANE)
    both = trajectory((record, found))
    chosen = replace(both, steps=(replace(both.steps[0], selected=(1,)),))
    assert predict(question(), both).facts == {("Silver Harp", 1)}
    assert predict(question(), chosen).facts == {("Orvane", 0)}
    # What was found and not used stays found.
    assert set(predict(question(), chosen).pages) == {"p1", "p2"}
