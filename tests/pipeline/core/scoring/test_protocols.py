"""The sets' own scores: hand-computed, and beside the published definitions on a thousand generated files each.

The generated files go through the readers and writers of predictions, so that these are tried as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.records import Evidence, Paragraph, Question
from pipeline.core.scoring.answers import ProtocolName
from pipeline.core.scoring.files import read_predictions, suffix_of
from pipeline.core.scoring.prediction import Prediction
from pipeline.core.scoring.protocols import score_predictions
from tests.pipeline.core.scoring import restated_sets as restated
from tests.pipeline.core.scoring.cases import A_THOUSAND, WORDS, phrases

Row = Mapping[str, Any]
ALIASES = {"id of Orvane": ["Orvane Ltd.", "the Orvane"], "id of Mara Velin": ["M. Velin"]}
ENTITIES = ["Orvane", "Mara Velin", "Trel", "yes"]

ids = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)
said = phrases([*WORDS, *ENTITIES])
golds = said.filter(str.strip)
facts = st.lists(st.sampled_from([["Orvane", 0], ["orvane", 0], ["Orvane", 1], ["Trel", 0]]), max_size=4)
triples = st.lists(
    st.tuples(
        st.sampled_from([*ENTITIES, "orvane ltd", "The Orvane"]),
        st.sampled_from(["founder", "maker"]),
        st.sampled_from([*ENTITIES, "M Velin"]),
    ).map(list),
    max_size=3,
)
pages = st.lists(st.sampled_from(["1", "2", "3"]).map(lambda page: {"wikipedia_id": page}), max_size=4)


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


def part(draw: st.DrawFn, names: Sequence[str], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Of some of these questions, always of the first: a file without any is refused."""
    return {name: draw(values) for name in names if name == names[0] or draw(st.booleans())}


# ---------------------------------------------------------------- HotpotQA


@st.composite
def hotpotqa_files(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any]]:
    names = draw(ids)
    rows = [
        {"_id": name, "answer": draw(golds), "supporting_facts": draw(facts.filter(bool))} for name in names
    ]
    return rows, {"answer": part(draw, names, said), "sp": part(draw, names, facts)}


def of_hotpotqa(row: Row) -> Question:
    evidence = Evidence(supporting_facts=tuple((title, number) for title, number in row["supporting_facts"]))
    return Question(row["_id"], "?", (row["answer"],), evidence=evidence)


@A_THOUSAND
@given(files=hotpotqa_files())
def test_hotpotqa_is_scored_as_published(folder: Path, files: tuple[list[Row], dict[str, Any]]) -> None:
    rows, prediction = files
    questions = [of_hotpotqa(row) for row in rows]
    assert scores(folder, "hotpotqa", questions, prediction) == pytest.approx(
        restated.hotpotqa(rows, prediction)
    )


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


@st.composite
def two_wiki_files(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any]]:
    names = draw(ids)
    rows = []
    for name in names:
        answer, evidences = draw(st.sampled_from(ENTITIES)), draw(triples.filter(bool))
        rows.append(
            {
                "_id": name,
                "answer": answer,
                "answer_id": f"id of {answer}",
                "supporting_facts": draw(facts.filter(bool)),
                "evidences": evidences,
                "evidences_id": [[f"id of {s}", r, f"id of {o}"] for s, r, o in evidences],
            }
        )
    prediction = {
        "answer": part(draw, names, said),
        "sp": part(draw, names, facts),
        "evidence": part(draw, names, triples),
    }
    return rows, prediction


def of_two_wiki(row: Row) -> Question:
    evidence = Evidence(
        supporting_facts=tuple((title, number) for title, number in row["supporting_facts"]),
        triples=tuple((s, r, o) for s, r, o in row["evidences"]),
        aliases={name: with_names(name)[1:] for name in ENTITIES},
    )
    return Question(row["_id"], "?", with_names(row["answer"]), evidence=evidence)


@A_THOUSAND
@given(files=two_wiki_files())
def test_2wikimultihopqa_is_scored_as_published(
    folder: Path, files: tuple[list[Row], dict[str, Any]]
) -> None:
    rows, prediction = files
    questions = [of_two_wiki(row) for row in rows]
    assert scores(folder, "2wikimultihopqa", questions, prediction) == pytest.approx(
        restated.two_wiki(rows, prediction, ALIASES)
    )


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


# ---------------------------------------------------------------- MuSiQue


@st.composite
def musique_files(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    rows, predicted = [], []
    for name in draw(ids):
        supports = draw(st.lists(st.booleans(), min_size=1, max_size=4))
        rows.append(
            {
                "id": name,
                "answer": draw(golds),
                "answer_aliases": draw(st.lists(golds, max_size=2)),
                "paragraphs": [
                    {"idx": place, "is_supporting": supporting} for place, supporting in enumerate(supports)
                ],
            }
        )
        predicted.append(
            {
                "id": name,
                "predicted_answer": draw(said),
                "predicted_support_idxs": draw(st.lists(st.integers(0, 4), max_size=4)),
                "predicted_answerable": True,
            }
        )
    return rows, predicted


def of_musique(row: Row) -> Question:
    paragraphs = row["paragraphs"]
    evidence = Evidence(
        context=tuple(Paragraph("", ()) for _ in paragraphs),
        supporting_paragraphs=tuple(p["idx"] for p in paragraphs if p["is_supporting"]),
    )
    return Question(row["id"], "?", (row["answer"], *row["answer_aliases"]), evidence=evidence)


@A_THOUSAND
@given(files=musique_files())
def test_musique_is_scored_as_published(folder: Path, files: tuple[list[Row], list[Row]]) -> None:
    rows, predicted = files
    questions = [of_musique(row) for row in rows]
    assert scores(folder, "musique", questions, predicted) == pytest.approx(restated.musique(rows, predicted))


# ---------------------------------------------------------------- KILT


@st.composite
def kilt_files(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    rows, guesses = [], []
    for name in draw(ids):
        outputs: list[Row] = [{"answer": draw(golds), "provenance": draw(pages.filter(bool))}]
        outputs += [{"provenance": draw(pages)}] if draw(st.booleans()) else []
        outputs += [{"answer": draw(golds)}] if draw(st.booleans()) else []
        rows.append({"id": name, "output": outputs})
        guesses.append({"id": name, "output": [{"answer": draw(said), "provenance": draw(pages)}]})
    return rows, guesses


def of_kilt(row: Row) -> Question:
    groups = [[page["wikipedia_id"] for page in output.get("provenance", [])] for output in row["output"]]
    answers = tuple(output["answer"] for output in row["output"] if "answer" in output)
    evidence = Evidence(provenance=tuple(tuple(dict.fromkeys(group)) for group in groups))
    return Question(row["id"], "?", answers, evidence=evidence)


@A_THOUSAND
@given(files=kilt_files())
def test_kilt_is_scored_as_published(folder: Path, files: tuple[list[Row], list[Row]]) -> None:
    rows, guesses = files
    questions = [of_kilt(row) for row in rows]
    assert scores(folder, "kilt", questions, guesses) == pytest.approx(restated.kilt(rows, guesses))


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
