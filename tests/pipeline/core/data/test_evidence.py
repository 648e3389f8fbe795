"""The evidence of a question as its data set's own rows give it, in every layout that they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.data.questions import read_questions
from pipeline.core.errors import UserError
from pipeline.core.records import Evidence, Paragraph

ROW = {"id": "1", "question": "Who founded the maker of the Silver Harp?", "answer": "Mara Velin"}
FACTS = (("Silver Harp", 1), ("Orvane", 0))
CONTEXT = (
    Paragraph("Silver Harp", ("It is a harp.", " Orvane makes it.")),
    Paragraph("Trel", ("A town.",)),
    Paragraph("Orvane", ("Mara Velin founded it.",)),
)


def evidence_of(tmp_path: Path, **fields: Any) -> Evidence:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**ROW, **fields}) + "\n")
    (question,) = read_questions([path], with_evidence=True)
    assert question.evidence is not None
    return question.evidence


@pytest.mark.parametrize(
    ("facts", "context"),
    [
        ([list(fact) for fact in FACTS], [[p.title, list(p.sentences)] for p in CONTEXT]),
        (
            {"title": [title for title, _ in FACTS], "sent_id": [number for _, number in FACTS]},
            {"title": [p.title for p in CONTEXT], "sentences": [list(p.sentences) for p in CONTEXT]},
        ),
        (
            {"title": [title for title, _ in FACTS], "sent_id": [number for _, number in FACTS]},
            {"title": [p.title for p in CONTEXT], "content": [list(p.sentences) for p in CONTEXT]},
        ),
    ],
    ids=["original file", "Hub", "FlashRAG"],
)
def test_supporting_facts_and_context_are_the_same_in_every_layout(
    tmp_path: Path, facts: Any, context: Any
) -> None:
    found = evidence_of(tmp_path, supporting_facts=facts, context=context)
    assert found == Evidence(supporting_facts=FACTS, context=CONTEXT, supporting_paragraphs=(0, 2))
    assert found.context[0].text == "It is a harp. Orvane makes it."


def test_musique_paragraphs_keep_their_order_and_which_support(tmp_path: Path) -> None:
    paragraphs = [
        {"idx": 0, "title": "Trel", "paragraph_text": "A town.", "is_supporting": False},
        {"idx": 1, "title": "Orvane", "paragraph_text": "Mara Velin founded it.", "is_supporting": True},
    ]
    found = evidence_of(tmp_path, paragraphs=paragraphs)
    assert [p.title for p in found.context] == ["Trel", "Orvane"]
    assert found.supporting_paragraphs == (1,)


def test_2wiki_triples_are_kept_with_the_other_names_of_their_entities(tmp_path: Path) -> None:
    found = evidence_of(
        tmp_path, evidences=[["Orvane", "founder", "Mara Velin"]], entity_aliases={"Mara Velin": ["M. Velin"]}
    )
    assert found.triples == (("Orvane", "founder", "Mara Velin"),)
    assert found.aliases == {"Mara Velin": ("M. Velin",)}


def test_the_pages_of_kilt_come_per_accepted_output(tmp_path: Path) -> None:
    pages = [{"wikipedia_id": "7"}, {"wikipedia_id": 9}, {"wikipedia_id": "7"}]
    found = evidence_of(tmp_path, output=[{"answer": "Mara Velin", "provenance": pages}, {"answer": "Mara"}])
    assert found.provenance == (("7", "9"), ())


def test_paragraphs_may_be_named_by_their_ids_in_the_corpus(tmp_path: Path) -> None:
    found = evidence_of(tmp_path, context_ids=["p3", "p1"], supporting_ids=["p1"])
    assert [p.id for p in found.context] == ["p3", "p1"]
    assert found.supporting_paragraphs == (1,)


@pytest.mark.parametrize(
    "fields",
    [
        {"supporting_facts": [["Orvane"]]},
        {"supporting_facts": [["Orvane", "0"]]},
        {"supporting_facts": 3},
        {"context": {"title": ["Orvane"], "sentences": []}},
        {"context": [["Orvane", [1]]]},
        {"context": {"title": ["Orvane"]}},
        {"paragraphs": [{"title": "Orvane"}]},
        {"entity_aliases": ["x"]},
        {"output": ["x"]},
        {"context": [["Orvane", ["Text."]]], "context_ids": ["a", "b"]},
    ],
)
def test_evidence_of_another_form_is_refused_with_its_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"q\.jsonl:1: .*evidence.*docs/formats\.md"):
        evidence_of(tmp_path, **fields)


def test_evidence_that_was_not_asked_for_changes_nothing_by_which_a_run_knows_a_question(
    tmp_path: Path,
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**ROW, "supporting_facts": [["Orvane", 0]]}) + "\n")
    (plain,), (full,) = read_questions([path]), read_questions([path], with_evidence=True)
    assert plain.evidence is None
    assert repr(plain) == repr(full)
