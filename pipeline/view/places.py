"""Where each question of a source is: pages that are found by the question's id, so that nobody reads all of them."""

from __future__ import annotations

import math

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.run import Json
from pipeline.view.questions import Asked
from pipeline.view.sources import Source
from pipeline.view.stored import NoSuchPage, marks_of

ROWS_PER_PAGE = 8192
"""Trajectories whose questions are on a page together, about."""


def spread_of(source: Source) -> int:
    """Over how many pages its questions are spread; what cannot be read counts for nothing."""
    rows = 0
    for part in source.parts:
        try:
            rows += part.num_rows()
        except (NoSuchPage, UserError):  # whoever looks at it is told
            continue
    return max(1, math.ceil(rows / ROWS_PER_PAGE))


def places_of(source: Source, count: int, place: int, asked: Asked) -> Json:
    """Of the questions whose ids' checksum modulo `count` is `place`: by part, of each the checksum (CRC-32) of its id
    (`ids`), its place in the part, and a checksum of its words, by which the same question is told from another one of
    that id; -1 where they are not known.

    Raises:
        NoSuchPage, UserError: there is no such page, or a file is damaged.
    """
    if place >= count:
        raise NoSuchPage(f"{source.key} is spread over {count} pages")
    found = {}
    for part in source.parts:
        ids, words = marks_of(part.path)
        if len(places := np.flatnonzero(ids % count == place)):
            here = ids[places]
            told = np.where(words[places] < 0, asked.words_of(source.split, here), words[places])
            found[part.name] = {"ids": here.tolist(), "places": places.tolist(), "words": told.tolist()}
    return {"parts": found}
