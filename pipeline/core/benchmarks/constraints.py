"""Generated tasks of instructed retrieval: find the responses that obey a constraint, in the style of IFEval.

All responses to a question say the same; they differ in letters, punctuation, format, length, what they begin and end
with and which words they have. A query is the question, its instruction the constraint. Relevant is what a program
checks to obey: the question's own responses of which the checker says so, and no others. So the judgements are true by
construction, and the question alone cannot tell them from those that do not obey.

IFEval: Zhou et al. 2023, arXiv 2311.07911; as a retrieval task with these eight kinds: MAIR, Sun et al. 2024,
arXiv 2410.10127. Questions and facts are those of `exsearch world`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.benchmarks.queries import Query, TaskQueries
from pipeline.core.benchmarks.spec import ConstraintsConfig
from pipeline.core.data.world.passages import passage_of
from pipeline.core.data.world.questions import generate_questions
from pipeline.core.data.world.spec import WorldSpec
from retriever_service.passages.corpus import Passage

Check = Callable[[str], bool]
_OPENING, _CLOSING = "My answer is as follows:", "Ask again if anything is unclear."
_POSTSCRIPT = "P.S."
_WORDS = ("indeed", "surely", "notably")
_PREFIX = "Find a response to the question that obeys this constraint: "


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a response has to look like.

    kind: one of `KINDS`. words: the constraint in English. check: whether a text obeys it.
    """

    kind: str
    words: str
    check: Check


def num_words(text: str) -> int:
    """Words of a text: runs of letters and digits, with apostrophes and hyphens inside."""
    return len(re.findall(r"\w+(?:['-]\w+)*", text))


def count_word(text: str, word: str) -> int:
    """How often a word stands in a text, in letters of any case."""
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def is_json(text: str) -> bool:
    """Whether a text is one JSON object, and nothing else."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def bullets(text: str) -> int:
    """Lines that begin with a bullet."""
    return sum(line.startswith("* ") for line in text.splitlines())


def _keyword(word: str, times: int) -> Constraint:
    plural = "once" if times == 1 else f"{times} times"
    return Constraint(
        "keywords",
        f'the response has the word "{word}" at least {plural}',
        lambda text: count_word(text, word) >= times,
    )


_NO_COMMA = Constraint("punctuation", "the response has no comma", lambda text: "," not in text)
_CAPITALS = Constraint("change_case", "the response is in capital letters only", str.isupper)
_LOWER = Constraint("change_case", "the response is in lower-case letters only", str.islower)
_JSON = Constraint("format", "the whole response is one JSON object", is_json)
_BULLETS = Constraint(
    "format",
    'the response is a list of at least two bullet points, lines that begin with "* "',
    lambda t: bullets(t) > 1,
)
_POST = Constraint(
    "content", f"the response has a postscript that begins with {_POSTSCRIPT}", lambda t: _POSTSCRIPT in t
)
_STARTS = Constraint(
    "startend", f'the response begins with "{_OPENING}"', lambda t: t.lower().startswith(_OPENING.lower())
)
_ENDS = Constraint(
    "startend", f'the response ends with "{_CLOSING}"', lambda t: t.lower().endswith(_CLOSING.lower())
)


def _both(first: Constraint, second: Constraint) -> Constraint:
    return Constraint(
        "combination",
        f"{first.words}, and {second.words}",
        lambda text: first.check(text) and second.check(text),
    )


def _length(words: int, *, at_most: bool) -> Constraint:
    return Constraint(
        "length",
        f"the response has {'at most' if at_most else 'at least'} {words} words",
        lambda text: num_words(text) <= words if at_most else num_words(text) >= words,
    )


CHOICES: dict[str, tuple[Constraint, ...]] = {
    "punctuation": (_NO_COMMA,),
    "keywords": tuple(_keyword(word, times) for word in _WORDS for times in (1, 2)),
    "format": (_JSON, _BULLETS),
    "startend": (_STARTS, _ENDS),
    "content": (_POST,),
    "combination": (
        _both(_NO_COMMA, _CAPITALS),
        _both(_NO_COMMA, _LOWER),
        _both(_POST, _LOWER),
        _both(_POST, _CAPITALS),
    ),
    "length": (_length(25, at_most=True), _length(45, at_most=False)),
    "change_case": (_CAPITALS, _LOWER),
}
KINDS = tuple(CHOICES)


@dataclass(frozen=True, slots=True)
class ConstraintTasks:
    """Responses, the corpus of all tasks, and the queries of each kind. `left_out`: by kind, questions of which no
    constraint parts the responses: all obey, or none does."""

    responses: tuple[Passage, ...]
    tasks: dict[str, TaskQueries]
    left_out: dict[str, int]


def generate_constraints(config: ConstraintsConfig) -> ConstraintTasks:
    """The tasks of a seed; the same arguments give the same tasks."""
    world = WorldSpec.of_size(config.seed, "small")
    responses: list[Passage] = []
    queries: dict[str, list[Query]] = {kind: [] for kind in KINDS}
    left_out = dict.fromkeys(KINDS, 0)
    for record in generate_questions(world, "test", config.questions):
        rng = random.Random(f"{config.seed}/{record['id']}")
        own = [
            Passage(f"{record['id']}-{number}", "", text)
            for number, text in enumerate(_responses(world, record, config.responses, rng))
        ]
        responses += own
        for kind, choices in CHOICES.items():
            query = _query(record, rng.sample(choices, len(choices)), own)
            if query is None:
                left_out[kind] += 1
            else:
                queries[kind].append(query)
    return ConstraintTasks(
        tuple(responses),
        {kind: TaskQueries(tuple(asked)) for kind, asked in queries.items() if asked},
        left_out,
    )


def _query(record: dict[str, Any], choices: Sequence[Constraint], own: Sequence[Passage]) -> Query | None:
    """With the first constraint that some of the responses obey and others do not."""
    for constraint in choices:
        gold = {response.id: int(constraint.check(response.text)) for response in own}
        if len(set(gold.values())) == 2:
            return Query(record["id"], record["question"], f"{_PREFIX}{constraint.words}.", gold)
    return None


def _responses(world: WorldSpec, record: dict[str, Any], number: int, rng: random.Random) -> Iterator[str]:
    """Different texts that all answer the question from its gold passages."""
    facts = [
        sentence
        for id_ in record["supporting_ids"]
        for sentence in _sentences(passage_of(world, id_)["text"])
    ]
    answer = f"Looking at what is known, the answer is {record['answers'][0]}."
    seen: set[str] = set()
    for _ in range(50 * number):
        text = _form([answer, *facts[: rng.choice((0, 1, 2, len(facts)))]], rng)
        if text not in seen:
            seen.add(text)
            yield text
        if len(seen) == number:
            return


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def _form(sentences: list[str], rng: random.Random) -> str:
    """One way of putting the same sentences."""
    words = [rng.choice(_WORDS) for _ in range(rng.choice((0, 0, 1, 2)))]
    sentences = [*sentences, *(f"That is {word} so." for word in words)]
    if rng.random() < 0.3:
        sentences.append(f"{_POSTSCRIPT} This was looked up, not guessed.")
    if rng.random() < 0.3:
        sentences.insert(0, _OPENING)
    if rng.random() < 0.3:
        sentences.append(_CLOSING)
    layout = rng.choice(("prose", "prose", "json", "bullets"))
    if rng.random() < 0.5:
        sentences = [sentence.replace(",", "") for sentence in sentences]
    if layout == "json":
        text = json.dumps({"answer": " ".join(sentences)}, ensure_ascii=False)
    else:
        text = "\n".join(f"* {s}" for s in sentences) if layout == "bullets" else " ".join(sentences)
    case: Callable[[str], str] = rng.choice((str, str, str.upper, str.lower))
    return case(text)
