"""Which passages an answer is traced back to."""

from __future__ import annotations

import pytest

from pipeline.core.records import Step
from pipeline.serve.citations import citations_of
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit


def step(*texts: str, record: str = "", selected: tuple[int, ...] = (), title: str = "T") -> Step:
    hits = tuple(Hit(Passage(f"p{text[:5]}", title, text), 1.0) for text in texts)
    return Step("query", hits, record=record, selected=selected)


@pytest.mark.parametrize(
    ("answer", "text", "quoted"),
    [
        ("Mara Velin", "founded by mara\n velin in 1984", "mara\n velin"),
        ("1984", "in 1984.", "1984"),
        ("$5 (five)", "it costs $5 (five) now", "$5 (five)"),
        ("Ann", "Annabel met Ann", "Ann"),
        ("İstanbul", "In İstanbul it rains", "İstanbul"),
        ("a.b", "axb a.b", "a.b"),
    ],
)
def test_the_span_holds_the_answer(answer: str, text: str, quoted: str) -> None:
    (citation,) = citations_of(answer, [step(text)])
    assert (text[citation.start : citation.end], citation.quotes) == (quoted, "answer")


def test_a_part_of_a_word_is_no_source() -> None:
    assert citations_of("art", [step("The party started.")]) == []


def test_nothing_is_cited_for_an_empty_answer_or_the_agents_own_words() -> None:
    assert citations_of("", [step("anything")]) == []
    assert citations_of("yes", [step("The sky is blue.", record="It is so")]) == []


def test_a_record_names_the_passages_behind_an_answer_in_own_words() -> None:
    steps = [step("A is older.", "B is young.", record="A is older."), step("B was born in 1900")]
    (citation,) = citations_of("A", [steps[0]])
    assert citation.quotes == "answer"
    (citation,) = citations_of("yes", steps)
    assert (citation.passage_id, citation.step, citation.quotes) == ("pA is ", 0, "record")


def test_a_passage_is_cited_once_and_one_that_was_not_selected_never() -> None:
    steps = [step("Mara here", "Mara there", selected=(1,)), step("Mara there")]
    assert [(c.passage_id, c.step) for c in citations_of("Mara", steps)] == [("pMara ", 0)]


def test_a_title_is_a_source_where_the_text_is_none() -> None:
    (citation,) = citations_of("Orvane", [step("A company.", title="Orvane")])
    assert (citation.field, citation.start, citation.end) == ("title", 0, 6)
