"""What is said in answer to one question, in the terms of the data sets."""

from __future__ import annotations

from dataclasses import dataclass

Fact = tuple[str, int]
"""(title, number of the sentence from 0)."""
Triple = tuple[str, str, str]
"""(subject, relation, object)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer and its evidence. None is what is not said at all, which is something else than nothing."""

    answer: str | None = None
    facts: frozenset[Fact] | None = None
    """Supporting sentences: HotpotQA, 2WikiMultihopQA."""
    triples: tuple[Triple, ...] | None = None
    """2WikiMultihopQA's evidence."""
    paragraphs: frozenset[int] | None = None
    """Supporting paragraphs by their places in the question's context: MuSiQue."""
    pages: tuple[str, ...] | None = None
    """Wikipedia ids, the best first: KILT."""


NOTHING = Prediction()
EVIDENCE = ("facts", "triples", "paragraphs", "pages")
"""The parts beside the answer."""
