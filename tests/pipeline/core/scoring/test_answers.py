"""Scores of answers: hand-computed values, the default beside KILT, and the published definitions said again."""

# ruff: noqa: RUF001  (other writing than ASCII is what this is about)

from __future__ import annotations

import unicodedata
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.core.scoring.answers import (
    RIGHT,
    RULES,
    WRONG,
    ProtocolName,
    normalise_answer,
    score_answer,
)
from tests.pipeline.core.scoring.cases import A_THOUSAND, answers, ascii_answers
from tests.pipeline.core.scoring.restated import PAIRS, best, squad_normal


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Beatles!", "beatles"),
        ("an A-Team, the", "ateam"),
        ("Star Wars: Episode IV", "star wars episode iv"),
        ("Hawaii", "hawaii"),  # not the letters "a" and "i", only the words
        ("O'Brien\n(1984)", "obrien 1984"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_in_kilt(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "f1", "accuracy"),
    [
        ("Mara Velin", ["Mara Velin"], 1, 1, 1),
        ("the mara velin.", ["Mara Velin"], 1, 1, 1),
        ("It was Mara Velin", ["Mara Velin"], 0, 2 * 2 / 6, 1),
        ("Velin Mara", ["Mara Velin"], 0, 1, 0),
        ("Mara", ["Mara Velin"], 0, 2 / 3, 0),
        ("nobody", ["Mara Velin"], 0, 0, 0),
        ("1984", ["in 1984", "1984"], 1, 1, 1),  # the best over gold answers
        ("Unesco", ["UN"], 0, 0, 0),  # whole tokens, not letters
        ("", ["Mara"], 0, 0, 0),
        ("x y x", ["x x"], 0, 4 / 5, 0),
    ],
)
def test_known_scores(prediction: str, golds: list[str], em: float, f1: float, accuracy: float) -> None:
    score = score_answer(prediction, golds)
    assert (score.em, score.f1, score.accuracy) == (em, pytest.approx(f1), accuracy)


def test_precision_and_recall_are_of_the_words() -> None:
    score = score_answer("It was Mara Velin", ["Mara Velin of Orvane"])
    assert (score.precision, score.recall) == (2 / 4, 2 / 4)
    score = score_answer("Mara", ["Mara Velin"])
    assert (score.precision, score.recall) == (1, 1 / 2)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("There is no evidence, so yes", "no"),
        ("yes it is", "yes"),
        ("No, they are not", "no"),
        ("no", "yes"),
        ("no", "No Country for Old Men"),
        ("noanswer", "noanswer given"),
    ],
)
def test_yes_no_and_noanswer_are_whole_answers(prediction: str, gold: str) -> None:
    assert score_answer(prediction, [gold]) == WRONG


@pytest.mark.parametrize(("prediction", "gold"), [("Yes.", "yes"), (" no!", "No"), ("NoAnswer", "noanswer")])
def test_yes_no_and_noanswer_are_right_when_they_are_all_that_is_said(prediction: str, gold: str) -> None:
    assert score_answer(prediction, [gold]) == RIGHT


@pytest.mark.parametrize("protocol", get_args(ProtocolName))
def test_a_sentence_with_the_word_no_is_not_accurate_in_any_protocol(protocol: ProtocolName) -> None:
    score = score_answer("There is no evidence, so yes", ["no"], protocol)
    assert (score.em, score.accuracy) == (0, 0)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("Beyonce\u0301", "Beyonc\u00e9"),
        ("Saint Mary’s", "Saint Mary's"),
        ("Hawai\u02bbi", "Hawai'i"),
        ("Hawai´i", "Hawai`i"),
        ("1914–1918", "1914-1918"),
        ("1914—1918", "1914-1918"),
        ("\u22125", "-5"),
        ("«Orvane»", '"Orvane"'),
        ("東京。", "東京"),
        ("Mission: Impossible – Fallout", "Mission: Impossible - Fallout"),
        ("¿Quién?", "quién"),
        ("１９８４", "1984"),
        ("hydro\u00adgen", "hydrogen"),
        ("\u200bOrvane\ufeff", "Orvane"),
        ("1\u00a0September\u202f1939", "1 September 1939"),
        ("STRASSE", "Straße"),
        ("❤\ufe0f Radio", "❤ Radio"),
        ("The Straße", "straße"),
    ],
)
def test_what_only_looks_different_is_the_same_answer(prediction: str, gold: str) -> None:
    assert score_answer(prediction, [gold]) == score_answer(gold, [prediction]) == RIGHT


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("Beyonce", "Beyoncé"),  # accents stay
        ("Die Zeit", "Zeit"),  # articles of other languages stay
        ("Le Monde", "Monde"),
        ("€5", "5"),  # signs that are no punctuation stay
        ("x\u0331a", "x\u0331"),  # "a" behind a combining mark is no word
    ],
)
def test_what_is_different_stays_different(prediction: str, gold: str) -> None:
    assert score_answer(prediction, [gold]).em == 0


def test_to_the_letter_of_kilt_these_are_different() -> None:
    for prediction, gold in [("Beyonce\u0301", "Beyonc\u00e9"), ("Mary’s", "Mary's"), ("1914–18", "1914-18")]:
        assert score_answer(prediction, [gold], "kilt").em == 0
    assert score_answer("yes it is", ["yes"], "kilt").f1 == 0.5
    assert score_answer("yes it is", ["yes"], "hotpotqa").f1 == 0


@pytest.mark.parametrize("gold", ["", " ", "A", "the", "!!!", "...", "The The"])
@pytest.mark.parametrize("prediction", ["", "anything", "Ali", "?", "a dog", "The Who"])
def test_a_gold_answer_of_nothing_but_stop_words_is_never_trivially_right(gold: str, prediction: str) -> None:
    assert score_answer(prediction, [gold]) == WRONG


@pytest.mark.parametrize(
    ("prediction", "gold"), [("!!!", "!!!"), ("a", "A"), ("the the.", "The The"), ("！！！", "!!!")]
)
def test_a_gold_answer_that_normalises_to_nothing_is_still_matched_by_itself(
    prediction: str, gold: str
) -> None:
    assert score_answer(prediction, [gold]) == RIGHT


def test_without_gold_answers_nothing_is_right() -> None:
    assert score_answer("x", []) == WRONG


@given(prediction=answers, golds=st.lists(answers, max_size=3))
def test_scores_are_shares_and_ordered(prediction: str, golds: list[str]) -> None:
    score = score_answer(prediction, golds)
    assert 0 <= score.em <= score.accuracy <= 1
    assert score.em <= score.f1 <= 1
    assert score_answer(prediction, [*golds, prediction]).f1 >= score.f1


@given(text=st.text(max_size=30))
def test_composed_and_decomposed_text_is_the_same(text: str) -> None:
    once = normalise_answer(text)
    assert once == normalise_answer(unicodedata.normalize("NFD", text))
    assert once == normalise_answer(unicodedata.normalize("NFC", text))


@A_THOUSAND
@given(prediction=ascii_answers, gold=ascii_answers)
def test_on_ascii_text_the_default_is_kilt_but_for_yes_and_no(prediction: str, gold: str) -> None:
    assert normalise_answer(prediction) == squad_normal(prediction)
    assume(squad_normal(gold))
    assume(not {squad_normal(prediction), squad_normal(gold)} & {"yes", "no", "noanswer"})
    assert score_answer(prediction, [gold]) == score_answer(prediction, [gold], "kilt")


def test_every_protocol_has_rules_and_a_definition() -> None:
    assert set(RULES) == set(get_args(ProtocolName)) == {*PAIRS, "exsearch"}


@A_THOUSAND
@given(prediction=answers, golds=st.lists(answers, min_size=1, max_size=3))
def test_answers_score_as_the_published_definitions_say(prediction: str, golds: list[str]) -> None:
    for protocol in PAIRS:
        score = score_answer(prediction, golds, protocol)
        found = (score.em, score.f1, score.precision, score.recall)
        assert found == pytest.approx(best(protocol, prediction, golds)), protocol
