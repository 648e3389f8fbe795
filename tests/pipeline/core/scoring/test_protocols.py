"""The sets' own scores: hand-computed, and beside the published definitions on a thousand generated files each.

The generated files go through the readers and writers of predictions, so that these are tried as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.records import Evidence, Paragraph, Question
from pipeline.core.scoring.answers import ProtocolName
from pipeline.core.scoring.files import read_predictions, suffix_of
from pipeline.core.scoring.prediction import Prediction
from pipeline.core.scoring.protocols import score_predictions
from tests.pipeline.core.scoring import restated_sets as restated
from tests.pipeline.core.scoring.generated import (
    ALIASES,
    ENTITIES,
    Chance,
    Row,
    hotpotqa_files,
    kilt_files,
    musique_files,
    two_wiki_files,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictions")


def scores(
    folder: Path, protocol: ProtocolName, questions: Sequence[Question], predictions: Any
) -> dict[str, float]:
    """Of predictions in the set's own format: one object, or rows."""
    path = folder / f"predictions{suffix_of(protocol)}"
    rows = predictions if isinstance(predictions, list) else [predictions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_predictions(protocol, path, questions)
    result: dict[str, float] = score_predictions(protocol, questions, found, bootstrap_samples=0)["scores"]
    return result


def with_names(name: str) -> tuple[str, ...]:
    return (name, *ALIASES.get(f"id of {name}", []))


# ---------------------------------------------------------------- HotpotQA


def of_hotpotqa(row: Row) -> Question:
    evidence = Evidence(supporting_facts=tuple((title, number) for title, number in row["supporting_facts"]))
    return Question(row["_id"], "?", (row["answer"],), evidence=evidence)


def test_hotpotqa_is_scored_as_published(folder: Path) -> None:
    for seed in range(1000):
        rows, prediction = hotpotqa_files(Chance(seed))
        found = scores(folder, "hotpotqa", [of_hotpotqa(row) for row in rows], prediction)
        assert found == pytest.approx(restated.hotpotqa(rows, prediction)), f"seed {seed}"


def test_hotpotqa_by_hand(folder: Path) -> None:
    rows = [
        {"_id": "a", "answer": "Mara Velin", "supporting_facts": [["Orvane", 0], ["Silver Harp", 1]]},
        {"_id": "b", "answer": "yes", "supporting_facts": [["Trel", 0], ["Orvane", 0]]},
    ]
    prediction = {
        "answer": {"a": "Mara", "b": "yes, both"},
        "sp": {"a": [["Orvane", 0], ["Trel", 2]], "b": [["Trel", 0], ["Orvane", 0]]},
    }
    found = scores(folder, "hotpotqa", [of_hotpotqa(row) for row in rows], prediction)
    # a: the answer has precision 1, recall 1/2; the facts 1/2 and 1/2. b: a yes that is not whole; the facts all right.
    assert (found["em"], found["f1"]) == (0, pytest.approx(100 * (2 / 3) / 2))
    assert (found["sp_em"], found["sp_f1"]) == (50, 75)
    assert (found["joint_prec"], found["joint_recall"]) == (25, 12.5)
    assert found["joint_f1"] == pytest.approx(100 * (2 * 1 / 2 * 1 / 4 / (3 / 4)) / 2)


def test_what_no_prediction_names_is_not_scored_and_what_one_lacks_counts_nothing(folder: Path) -> None:
    questions = [
        of_hotpotqa({"_id": name, "answer": "Orvane", "supporting_facts": [["Orvane", 0]]}) for name in "ab"
    ]
    answers = {"answer": {"a": "Orvane", "b": "Orvane"}}
    assert set(scores(folder, "hotpotqa", questions, answers)) == {"em", "f1", "prec", "recall"}
    found = scores(folder, "hotpotqa", questions, {**answers, "sp": {"a": [["Orvane", 0]]}})
    assert (found["em"], found["sp_em"], found["joint_em"]) == (100, 50, 50)


# ---------------------------------------------------------------- 2WikiMultihopQA


def of_two_wiki(row: Row) -> Question:
    evidence = Evidence(
        supporting_facts=tuple((title, number) for title, number in row["supporting_facts"]),
        triples=tuple((s, r, o) for s, r, o in row["evidences"]),
        aliases={name: with_names(name)[1:] for name in ENTITIES},
    )
    return Question(row["_id"], "?", with_names(row["answer"]), evidence=evidence)


def test_2wikimultihopqa_is_scored_as_published(folder: Path) -> None:
    for seed in range(1000):
        rows, prediction = two_wiki_files(Chance(seed))
        found = scores(folder, "2wikimultihopqa", [of_two_wiki(row) for row in rows], prediction)
        assert found == pytest.approx(restated.two_wiki(rows, prediction, ALIASES)), f"seed {seed}"


def test_2wikimultihopqa_by_hand(folder: Path) -> None:
    row = {
        "_id": "a",
        "answer": "Orvane",
        "supporting_facts": [["Orvane", 0]],
        "evidences": [["Orvane", "founder", "Mara Velin"], ["Mara Velin", "born in", "Trel"]],
    }
    prediction = {
        "answer": {"a": "orvane ltd"},
        "sp": {"a": [["ORVANE", 0]]},
        "evidence": {"a": [["the Orvane", "Founder", "M. Velin"], ["Trel", "maker", "Orvane"]]},
    }
    found = scores(folder, "2wikimultihopqa", [of_two_wiki(row)], prediction)
    assert (found["em"], found["sp_em"], found["evi_em"], found["evi_f1"]) == (100, 100, 0, 50)
    assert (found["joint_em"], found["joint_f1"]) == (0, 50)


def test_2wikimultihopqa_counts_a_fact_twice_that_is_named_in_two_cases_as_its_script_does(
    folder: Path,
) -> None:
    row = {"_id": "a", "answer": "Orvane", "evidences": [["Orvane", "maker", "Trel"]]}
    questions = [of_two_wiki({**row, "supporting_facts": [["Orvane", 0], ["Trel", 0]]})]
    prediction = {"answer": {"a": ""}, "sp": {"a": [["Orvane", 0], ["ORVANE", 0]]}}
    found = scores(folder, "2wikimultihopqa", questions, prediction)
    assert (found["sp_prec"], found["sp_recall"]) == (100, pytest.approx(200 / 3))


# ---------------------------------------------------------------- MuSiQue


def of_musique(row: Row) -> Question:
    paragraphs = row["paragraphs"]
    evidence = Evidence(
        context=tuple(Paragraph("", ()) for _ in paragraphs),
        supporting_paragraphs=tuple(p["idx"] for p in paragraphs if p["is_supporting"]),
    )
    return Question(row["id"], "?", (row["answer"], *row["answer_aliases"]), evidence=evidence)


def test_musique_is_scored_as_published(folder: Path) -> None:
    for seed in range(1000):
        rows, prediction = musique_files(Chance(seed))
        found = scores(folder, "musique", [of_musique(row) for row in rows], prediction)
        assert found == pytest.approx(restated.musique(rows, prediction)), f"seed {seed}"


# ---------------------------------------------------------------- KILT


def of_kilt(row: Row) -> Question:
    groups = [[page["wikipedia_id"] for page in output.get("provenance", [])] for output in row["output"]]
    answers = tuple(output["answer"] for output in row["output"] if "answer" in output)
    evidence = Evidence(provenance=tuple(tuple(dict.fromkeys(group)) for group in groups))
    return Question(row["id"], "?", answers, evidence=evidence)


def test_kilt_is_scored_as_published(folder: Path) -> None:
    for seed in range(1000):
        rows, prediction = kilt_files(Chance(seed))
        found = scores(folder, "kilt", [of_kilt(row) for row in rows], prediction)
        assert found == pytest.approx(restated.kilt(rows, prediction)), f"seed {seed}"


def test_kilt_by_hand() -> None:
    question = Question("a", "?", ("Orvane",), evidence=Evidence(provenance=(("1", "2"), ("3",))))
    for given_pages, precision in [(("2", "1"), 100), (("3", "9"), 100), (("1", "3"), 50), (("9", "1"), 50)]:
        prediction = {"a": Prediction(answer="Orvane", pages=given_pages)}
        found = score_predictions("kilt", [question], prediction)["scores"]
        assert (found["em"], found["Rprec"]) == (100, precision)
        assert found["KILT-em"] == (100 if precision == 100 else 0)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("protocol", ["exsearch", "bamboogle", "nq", "triviaqa"])
def test_sets_without_evidence_are_scored_by_their_answers(protocol: ProtocolName) -> None:
    questions = [Question(name, "?", ("Mara Velin",)) for name in "abc"]
    predictions = {"a": Prediction(answer="mara velin"), "b": Prediction(answer="It was Mara Velin.")}
    found = score_predictions(protocol, questions, predictions)
    assert (found["n"], found["predicted"]) == (3, 2)
    assert found["scores"] == pytest.approx({"em": 100 / 3, "f1": 100 * (1 + 2 / 3) / 3, "accuracy": 200 / 3})
    low, high = found["intervals"]["em"]
    assert 0 < low < 100 / 3 < high < 100


def test_evidence_is_scored_over_the_questions_that_have_some() -> None:
    questions = [
        of_hotpotqa({"_id": "a", "answer": "Orvane", "supporting_facts": [["Orvane", 0]]}),
        Question("b", "?", ("Trel",)),
    ]
    predictions = {name: Prediction("Orvane", facts=frozenset({("Orvane", 0)})) for name in "ab"}
    found = score_predictions("hotpotqa", questions, predictions)
    assert (found["scores"]["em"], found["counted"]["em"]) == (50, 2)
    assert (found["scores"]["sp_em"], found["counted"]["sp_em"]) == (100, 1)
