"""Sentences of prose."""

from __future__ import annotations

import re

# Not behind an initial or a common abbreviation ("J. Smith", "St. Louis"); the next sentence starts like one.
_SENTENCE_END = re.compile(
    r"""(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|Ms|St|Jr|Sr|vs|No)\.)(?<=[.!?])\s+(?=["'(]?[A-Z0-9])"""
)


def split_sentences(text: str) -> list[str]:
    """Sentences of a passage, by punctuation; good enough for prose, never loses a word."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]
