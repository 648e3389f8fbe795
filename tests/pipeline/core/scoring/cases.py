"""Answers as they come: words that meet by chance often, with every kind of writing that the protocols tell apart."""

# ruff: noqa: RUF001  (other writing than ASCII is what this is about)

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

A_THOUSAND = settings(max_examples=1000, deadline=None)

WORDS = [
    *("yes", "no", "noanswer", "Yes.", "NO", "no answer", "a", "The", "an", "the"),
    *("Mara", "mara", "Velin", "Velin's", "Velin’s", "O'Brien", "1914-1918", "1914–1918", "1,984", "$5"),
    *("Beyoncé", "Beyonce\u0301", "«Orvane»", "under_score", "!!!", "...", "\u00a0", "東京。", "´", "Straße"),
]
ASCII_WORDS = [word for word in WORDS if word.isascii()]


def phrases(words: list[str]) -> st.SearchStrategy[str]:
    """One to five words, with spaces or without."""
    return st.builds(
        str.join, st.sampled_from([" ", "", "  ", "-"]), st.lists(st.sampled_from(words), max_size=5)
    )


answers = st.one_of(phrases(WORDS), phrases(WORDS), st.text(max_size=12))
ascii_answers = st.one_of(
    phrases(ASCII_WORDS), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
)
