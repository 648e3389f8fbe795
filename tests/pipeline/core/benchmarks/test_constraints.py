"""Generated tasks: the checkers by themselves, and judgements that say what the checkers say."""

from __future__ import annotations

import json

import pytest

from pipeline.core.benchmarks.constraints import CHOICES, KINDS, Constraint, generate_constraints, num_words
from pipeline.core.benchmarks.spec import ConstraintsConfig

SMALL = ConstraintsConfig(questions=6, responses=10)
EVERY = {constraint.words: constraint for choices in CHOICES.values() for constraint in choices}


def constraint(words: str) -> Constraint:
    (found,) = [one for text, one in EVERY.items() if text == words]
    return found


@pytest.mark.parametrize(
    ("words", "obeys", "fails"),
    [
        ("the response has no comma", "It is red.", "It is, red."),
        ('the response has the word "indeed" at least 2 times', "Indeed, indeed.", "Indeed, indeedy."),
        ("the whole response is one JSON object", '{"answer": "red"}', '["red"]'),
        (
            'the response is a list of at least two bullet points, lines that begin with "* "',
            "* One.\n* Two.",
            "* One. * Two.",
        ),
        ('the response begins with "My answer is as follows:"', "MY ANSWER IS AS FOLLOWS: RED", "It is red."),
        (
            'the response ends with "Ask again if anything is unclear."',
            "ask again if anything is unclear.",
            "Ask.",
        ),
        ("the response has a postscript that begins with P.S.", "Red. P.S. Not blue.", "Red. p.s. Not blue."),
        ("the response has at most 25 words", "one two", "word " * 26),
        ("the response has at least 45 words", "word " * 45, "word " * 44),
        ("the response is in capital letters only", "IT IS 1 RED.", "IT IS Red."),
        ("the response is in lower-case letters only", "it is 1 red.", "It is red."),
        (
            "the response has no comma, and the response is in capital letters only",
            "IT IS RED.",
            "IT IS, RED.",
        ),
    ],
)
def test_a_checker_says_what_its_words_say(words: str, obeys: str, fails: str) -> None:
    found = constraint(words)
    assert found.check(obeys) and not found.check(fails)


def test_words_are_counted_as_people_do() -> None:
    assert num_words("It's a well-known fact: 42, indeed!") == 6


def test_relevant_is_exactly_what_obeys_among_the_responses_to_the_question() -> None:
    made = generate_constraints(SMALL)
    texts = {response.id: response.text for response in made.responses}
    assert tuple(made.tasks) == KINDS
    for kind, asked in made.tasks.items():
        assert len(asked.queries) + made.left_out[kind] == SMALL.questions
        for query in asked.queries:
            words = query.instruction.removeprefix(
                "Find a response to the question that obeys this constraint: "
            )[:-1]
            of_kind = constraint(words)
            assert of_kind.kind == kind
            assert {id_: of_kind.check(texts[id_]) for id_ in query.gold} == query.gold
            assert set(query.gold) == {id_ for id_ in texts if id_.rsplit("-", 1)[0] == query.id}
            # Some obey and some do not: the question alone could not tell.
            assert set(query.gold.values()) == {0, 1}


def test_all_responses_differ_and_name_the_answer() -> None:
    responses = generate_constraints(SMALL).responses
    assert len({response.text for response in responses}) == len(responses) == 60
    assert all("the answer is" in response.text.lower() for response in responses)
    assert any(isinstance(json.loads(r.text), dict) for r in responses if r.text.startswith("{"))


def test_the_same_seed_gives_the_same_tasks() -> None:
    first, second = generate_constraints(SMALL), generate_constraints(SMALL)
    assert (first.responses, first.left_out) == (second.responses, second.left_out)
    assert first.responses != generate_constraints(SMALL.model_copy(update={"seed": 1})).responses
    assert [q for t in first.tasks.values() for q in t.queries] == [
        q for t in second.tasks.values() for q in t.queries
    ]
