"""What is in the data more than once: questions that are trained on and asked again, passages that say the same."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipeline.core.data.coverage import Words, words
from pipeline.core.records import Question
from retriever_service.passages.corpus import Passage, words_hash

FEW = 5
"""As many examples are named."""

Pair = tuple[str, str]
"""Two ids, the one that comes first in front."""

_NUMBERS = npt.NDArray[np.uint64]


def shared_wordings(train: Sequence[Question], asked: Sequence[Question]) -> list[Pair]:
    """(id in train, id in the other set) of each question of `asked` that is also trained on in the same words, however
    they are written, under whatever id.
    """
    first = _by_wording(train)
    return [(first[wording].id, q.id) for q in asked if (wording := words(q.text)) in first]


def repeated_wordings(questions: Sequence[Question]) -> list[Pair]:
    """(first id, id) of each question that one before it in the same set has asked in the same words."""
    first = _by_wording(questions)
    return [(before.id, q.id) for q in questions if (before := first[words(q.text)]) is not q]


def _by_wording(questions: Sequence[Question]) -> dict[Words, Question]:
    return {words(question.text): question for question in reversed(questions)}


@dataclass(frozen=True, slots=True)
class PassageCounts:
    """What a corpus holds, united by ids as an index unites it."""

    passages: int
    duplicates: int
    """Passages with the same letters and digits as another one under another id."""
    examples: tuple[Pair, ...]


class PassageCounter:
    """Counts passages while they go by. Memory: 16 bytes a passage, and five times that at the end."""

    def __init__(self) -> None:
        self._ids, self._words = array("Q"), array("Q")

    def look_at(self, passage: Passage) -> None:
        """Count the next passage."""
        # Not Python's own hash, which is another one in every process: examples are the same each time.
        digest = hashlib.blake2b(passage.id.encode(), digest_size=8).digest()
        self._ids.append(int.from_bytes(digest, "little"))
        self._words.append(words_hash(passage))

    def counts(self, again: Callable[[], Iterable[Passage]]) -> PassageCounts:
        """After the last passage.

        Args:
            again: gives the same passages once more, to name examples.
        """
        ids, wordings = np.frombuffer(self._ids, np.uint64), np.frombuffer(self._words, np.uint64)
        order = np.lexsort((ids, wordings))
        same_words = wordings[order[1:]] == wordings[order[:-1]]
        same_id = ids[order[1:]] == ids[order[:-1]]
        places = np.flatnonzero(same_words & ~same_id)
        rows = [sorted((int(order[place]), int(order[place + 1]))) for place in places[:FEW]]
        named = _ids_of({row for pair in rows for row in pair}, again)
        return PassageCounts(
            passages=len(ids) - int(np.count_nonzero(same_words & same_id)),
            duplicates=len(places),
            examples=tuple((named[first], named[second]) for first, second in rows),
        )


def _ids_of(rows: set[int], again: Callable[[], Iterable[Passage]]) -> dict[int, str]:
    passages = islice(again(), max(rows) + 1) if rows else ()
    return {row: passage.id for row, passage in enumerate(passages) if row in rows}
