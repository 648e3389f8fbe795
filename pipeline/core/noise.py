"""Corrupted retrieval: passages that do not belong there, to see what an agent makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from retriever_service.passages.hits import Hit

PLACES = 50
"""So far behind the passage that it takes the place of ranks one that does not belong there, at least; where more are
shown as many places as these are, lest a passage is shown twice."""


def depth_with_noise(documents: int, noise: float) -> int:
    """How many passages have to be searched for where so many are wanted."""
    return documents + max(PLACES, documents) if noise else documents


def with_noise(hits: Sequence[Hit], query: str, documents: int, noise: float) -> list[Hit]:
    """The best `documents` hits, each replaced with the probability `noise` by one far behind it (`PLACES`).

    The same query and hits give the same. Where nothing ranks so far behind, a hit stays.

    Args:
        hits: `depth_with_noise` of them, best first.
    """
    generator = random.Random(query)
    found, behind = list(hits[:documents]), max(PLACES, documents)
    for place in range(len(found)):
        if generator.random() < noise and place + behind < len(hits):
            found[place] = hits[place + behind]
    return found
