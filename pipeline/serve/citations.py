"""Where an answer comes from.

The agent marks no sources: it writes down what it read, and answers from that. So a citation is found here, by the
words: a passage is cited if the answer stands in it, or a record that the agent made of it does. Case and white space
do not count. What the agent said in its own words is cited by nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.core.records import Step

Place = Literal["text", "title"]


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer comes from.

    Attributes:
        step: of the search that found it, from 0.
        field, start, end: the characters of the passage's text or title that say so, `end` not included.
        quotes: what these are: the answer itself, or a record.
    """

    passage_id: str
    title: str
    step: int
    field: Place
    start: int
    end: int
    quotes: Literal["answer", "record"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def citations_of(answer: str, steps: Sequence[Step]) -> list[Citation]:
    """Of the passages that the agent used, those in which the answer stands, then those in which a record does.

    Each passage is cited once, by the search that found it first.
    """
    found: dict[str, Citation] = {}
    for citation in [*_quoted(answer, "answer", steps), *_records(steps)]:
        found.setdefault(citation.passage_id, citation)
    return list(found.values())


def _records(steps: Sequence[Step]) -> Iterator[Citation]:
    for number, step in enumerate(steps):
        yield from _quoted(step.record, "record", [step], number)


def _quoted(
    words: str, quotes: Literal["answer", "record"], steps: Sequence[Step], first: int = 0
) -> Iterator[Citation]:
    pattern = _pattern(words)
    if pattern is None:
        return
    for number, step in enumerate(steps, start=first):
        for hit in step.used_hits:
            places: tuple[tuple[Place, str], ...] = (("text", hit.passage.text), ("title", hit.passage.title))
            for place, text in places:
                if match := pattern.search(text):
                    yield Citation(
                        hit.passage.id, hit.passage.title, number, place, match.start(), match.end(), quotes
                    )
                    break


def _pattern(words: str) -> re.Pattern[str] | None:
    """Finds these words as whole words; None if there are none."""
    parts = words.strip().rstrip(".").split()
    if not parts:
        return None
    spaced = r"\s+".join(map(re.escape, parts))
    return re.compile(rf"(?<!\w){spaced}(?!\w)", re.IGNORECASE)
