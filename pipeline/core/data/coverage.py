"""Evidence coverage: for how many questions does the corpus hold what an answer needs?

A question is covered if every gold passage that it names is in the corpus, or if any passage holds one of its accepted
answers. No retriever finds what is not there: coverage bounds what searching can gain.

An answer is held where its words come one behind the other, in title or text; case, punctuation, composition of letters
and a leading article make no difference. Answers that say nothing where they stand (yes, no) are not looked for; a
question that has no other and names no gold passage is not judged.

One pass over the corpus, in any order. Memory: that of the questions; an answer that was found is looked for no more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pipeline.core.records import Question
from retriever_service.passages.corpus import Passage

Words = tuple[str, ...]

_WORD = re.compile(r"\w+")
_ARTICLES = ("a", "an", "the")
_SAY_NOTHING: frozenset[Words] = frozenset({("yes",), ("no",), ("noanswer",), ()})


@dataclass(frozen=True, slots=True)
class Coverage:
    """Numbers of questions of one set."""

    questions: int
    judged: int
    """Those that name gold passages, or have an answer that can be looked for."""
    covered: int
    """Of the judged ones."""
    with_gold: int
    """Those that name gold passages."""
    gold_found: int
    """Of them, those whose gold passages are all there."""
    answer_found: int
    """Those with a passage that holds an accepted answer."""
    missing_gold: tuple[str, ...]
    """Ids of a few gold passages that are not there."""

    @property
    def percent(self) -> float | None:
        """Covered ones of a hundred judged ones; None where there are none."""
        return 100.0 * self.covered / self.judged if self.judged else None

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {"percent": self.percent} | asdict(self)


def coverage_of(sets: Mapping[str, Sequence[Question]], passages: Iterable[Passage]) -> dict[str, Coverage]:
    """The coverage of each set of questions, by its name, in one pass."""
    search = EvidenceSearch([question for questions in sets.values() for question in questions])
    for passage in passages:
        search.look_at(passage)
    return {name: search.coverage(questions) for name, questions in sets.items()}


class EvidenceSearch:
    """Looks for gold passages and gold answers while the corpus goes by."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._golds = {q: frozenset(gold_ids(q)) for q in questions}
        self._wanted_ids = {id_ for golds in self._golds.values() for id_ in golds}
        self._answers = {q: _looked_for(q) for q in questions}
        self._open = _Phrases({phrase for answers in self._answers.values() for phrase in answers})
        self._found_ids: set[str] = set()
        self._found: set[Words] = set()

    def look_at(self, passage: Passage) -> None:
        """Look into the next passage."""
        if passage.id in self._wanted_ids:
            self._found_ids.add(passage.id)
        for text in (passage.title, passage.text):
            self._found.update(self._open.take_from(words(text)))

    def coverage(self, questions: Sequence[Question]) -> Coverage:
        """Of questions that the search was made for, after the last passage."""
        with_gold = [q for q in questions if self._golds[q]]
        gold = {q for q in with_gold if self._golds[q] <= self._found_ids}
        answer = {q for q in questions if self._answers[q] & self._found}
        missing = sorted({id_ for q in with_gold for id_ in self._golds[q]} - self._found_ids)
        return Coverage(
            questions=len(questions),
            judged=sum(bool(self._golds[q] or self._answers[q]) for q in questions),
            covered=len(gold | answer),
            with_gold=len(with_gold),
            gold_found=len(gold),
            answer_found=len(answer),
            missing_gold=tuple(missing[:_FEW]),
        )


_FEW = 5


class _Phrases:
    """A set of phrases, each of which is taken out where it occurs first."""

    def __init__(self, phrases: Set[Words]) -> None:
        self._single = {phrase[0] for phrase in phrases if len(phrase) == 1}
        self._longer = {phrase for phrase in phrases if len(phrase) > 1}
        # Few texts have the first two words of one: only there is it looked for.
        self._lengths: dict[Words, set[int]] = {}
        for phrase in self._longer:
            self._lengths.setdefault(phrase[:2], set()).add(len(phrase))

    def take_from(self, text: Words) -> list[Words]:
        """The phrases that occur in the text; they are in the set no longer."""
        single = self._single.intersection(text)
        self._single -= single
        longer = {
            phrase
            for start, pair in enumerate(pairwise(text))
            if pair in self._lengths
            for length in self._lengths[pair]
            if (phrase := text[start : start + length]) in self._longer
        }
        self._longer -= longer
        return [*((word,) for word in single), *longer]


def gold_ids(question: Question) -> tuple[str, ...]:
    """Ids of the gold passages that a question names, in their order, each once."""
    hops = [hop.supporting_id for hop in question.decomposition if hop.supporting_id]
    return tuple(dict.fromkeys([*question.supporting_ids, *hops]))


def words(text: str) -> Words:
    """The words of a text, so that equal ones are equal however they are written."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _looked_for(question: Question) -> frozenset[Words]:
    return frozenset(_without_article(words(answer)) for answer in question.answers) - _SAY_NOTHING


def _without_article(phrase: Words) -> Words:
    return phrase[1:] if len(phrase) > 1 and phrase[0] in _ARTICLES else phrase
