"""The gold steps of a question, from what the public data sets give along with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.core.data.supervision import GoldStep, Unusable, best_sentence, gold_steps
from pipeline.core.records import Hop, Question
from pipeline.core.sentences import split_sentences
from retriever_service.passages.corpus import Passage
from tests.pipeline.core.data.cold_start_support import CORPUS, QUESTION


def steps_of(question: Question, shown: Callable[[Passage], str] = lambda p: p.text) -> list[GoldStep]:
    return gold_steps(question, CORPUS.get, shown)


def test_without_evidence_the_sentence_that_states_the_answer_is_taken() -> None:
    hops = (Hop("maker of Silver Harp", "Orvane"), Hop("Who founded Orvane?", "Mara Velin"))
    # As in MuSiQue: supporting passages in any order, not assigned to hops.
    question = Question(
        "q", QUESTION.text, ("Mara Velin",), supporting_ids=("orvane", "harp"), decomposition=hops
    )
    assert [(s.query, s.evidence, s.passage.id) for s in steps_of(question)] == [
        ("maker of Silver Harp", "Silver Harp: It is made by Orvane.", "harp"),
        ("Who founded Orvane?", "Orvane: It was founded by Mara Velin in 1984.", "orvane"),
    ]


def test_an_answer_that_no_sentence_states_is_recorded_with_its_sub_query() -> None:
    hops = (Hop("Which sea is Tal at?", "North Sea"), Hop("depth of North Sea", "95 m"))
    question = Question("q", "How deep?", ("95 m",), supporting_ids=("tal",), decomposition=hops)
    assert [step.evidence for step in steps_of(question)] == [
        "Which sea is Tal at? North Sea",
        "depth of North Sea: 95 m",
    ]


def test_supporting_passages_alone_make_a_path_from_the_named_one_to_the_answer() -> None:
    question = Question("q", QUESTION.text, ("Mara Velin",), supporting_ids=("orvane", "harp"))
    assert [(s.query, s.evidence) for s in steps_of(question)] == [
        ("Silver Harp", "Silver Harp: It is made by Orvane."),
        ("Orvane", "Orvane: It was founded by Mara Velin in 1984."),
    ]


def test_a_single_supporting_passage_is_searched_with_the_question() -> None:
    question = Question("q", "When was Orvane founded?", ("1984",), supporting_ids=("orvane",))
    (step,) = steps_of(question)
    assert (step.query, step.answer) == ("When was Orvane founded?", "1984")
    assert step.evidence == "Orvane: It was founded by Mara Velin in 1984."


def test_evidence_is_only_taken_from_what_the_agent_can_see() -> None:
    question = Question("q", "When was Orvane founded?", ("1984",), supporting_ids=("orvane",))
    (step,) = steps_of(question, lambda passage: passage.text[:27])
    assert step.evidence == "Orvane is a company in Tal."


def test_a_question_without_supervision_is_unusable() -> None:
    with pytest.raises(Unusable, match="no supporting passages"):
        steps_of(Question("q", "Who?", ("Ada",), decomposition=(Hop("Who?", "Ada"),)))


def test_sentences_end_where_sentences_end() -> None:
    text = 'Dr. Oll met J. Smith in St. Louis. "Why?" he asked. It was 3.5 km away, e.g. far! Yes.'
    assert split_sentences(text) == [
        "Dr. Oll met J. Smith in St. Louis.",
        '"Why?" he asked.',
        "It was 3.5 km away, e.g. far!",
        "Yes.",
    ]
    assert best_sentence(Passage("p", "", ""), "", "x", "y") == ""
