"""Passages in an order, by the numbers under which they are shown: `[2] > [1]`.

In text they are counted from 1, as an observation shows them; in records from 0, as places among the hits. Here is the
only place where one becomes the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = r"\[(\d+)\]"
_ORDERING = rf"{_NUMBER}(?:\s*>\s*{_NUMBER})*"


class BadOrdering(ValueError):
    """A text is not an ordering of the passages shown; the message says why."""


def ordering_text(order: Sequence[int]) -> str:
    """Passages that are counted from 0, as a model names them; inverse of `parse_ordering`."""
    return " > ".join(f"[{place + 1}]" for place in order)


def named_passages(text: str, count: int) -> list[int]:
    """The passages that a text names, each once, without numbers that no passage has.

    Args:
        count: passages shown.
    """
    numbers = dict.fromkeys(_places(text))
    return [place for place in numbers if 0 <= place < count]


def parse_ordering(text: str, count: int, most: int) -> tuple[int, ...]:
    """The passages of an ordering, counted from 0, the best first.

    Args:
        count: passages shown.
        most: passages that it may name.

    Raises:
        BadOrdering: it is no ordering, names a passage twice or one that is not shown, or too many.
    """
    if re.fullmatch(_ORDERING, text) is None:
        raise BadOrdering("it must name passages by their numbers, as in [2] > [1]")
    places = _places(text)
    if any(not 0 <= place < count for place in places):
        raise BadOrdering(f"it names a passage that is not there, of {count}")
    if len(set(places)) < len(places):
        raise BadOrdering("it names a passage twice")
    if len(places) > most:
        raise BadOrdering(f"it names {len(places)} passages, of at most {most}")
    return tuple(places)


def _places(text: str) -> list[int]:
    return [int(number) - 1 for number in re.findall(_NUMBER, text)]
