"""What a text is searched by: its terms, of passages and queries alike.

Guarantees:
- text in ASCII gives its runs of letters, digits and underscores, in lower case, without English stop words, stemmed by
  Porter's rules: the analysis of Anserini's regressions on BEIR;
- in other scripts a word holds its combining marks: vowel signs and viramas of Indic scripts, accents that no single
  character has. Marks that are left out in ordinary writing do not tell words apart: vowels of Arabic and Hebrew,
  tatweel, joiners, soft hyphens;
- scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese and their like) give every two characters that
  stand beside each other, marks included, as Lucene's CJKAnalyzer does; a character that stands alone is a term. Korean
  has spaces, and words;
- a change of script within a run of letters is kept where both have spaces, and ends a word where one has none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

import regex

STEMMER = "porter"
ANALYSIS = {"stemmer": STEMMER, "stop_words": "lucene", "words": "marks-and-bigrams"}
"""What an index records: terms of another analysis would not be found in it."""

# Unicode's line breaking needs a dictionary for the South-East Asian scripts without spaces (class SA).
_UNSPACED = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{scx=Hiragana}\p{Line_Break=SA}]&&[\p{L}\p{Nl}]]"
_MARK = r"[\p{Mn}\p{Mc}]"
_WORDS = regex.compile(
    rf"(?P<run>(?:{_UNSPACED}{_MARK}*+)++)|(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}_]{_MARK}*+)++", regex.V1
)
_CHARACTERS = regex.compile(rf".{_MARK}*+", regex.V1)
# A zero-width space separates words. Most vowels of Arabic belong to no one script.
_LEFT_OUT = regex.compile(
    r"[[\p{DI}--\u200B]\u0640[[\p{Arabic}\p{Hebrew}\u064B-\u0655\u0670]&&\p{Mn}]]+", regex.V1
)
# Python's own expressions are ten times as fast, and most words of most corpora need no more.
_ASCII_OR_UNCERTAIN = re.compile(r"[A-Za-z0-9_\u0080-\U0010ffff]+")


class Analyser:
    """Makes terms of a text."""

    def __init__(self) -> None:
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        self._stem = Stemmer.Stemmer(STEMMER).stemWords
        self._stop_words = frozenset(STOPWORDS_EN)

    def __call__(self, text: str) -> list[str]:
        terms: list[str] = self._stem([word for word in _words(text) if word not in self._stop_words])
        return terms


def _words(text: str) -> Iterator[str]:
    for piece in _ASCII_OR_UNCERTAIN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if piece.isascii():
            yield piece
        else:
            yield from _words_of_any_script(piece)


def _words_of_any_script(folded: str) -> Iterator[str]:
    for found in _WORDS.finditer(_LEFT_OUT.sub("", folded)):
        if found["run"] is None:
            yield found[0]
        else:
            yield from _bigrams(found[0])


def _bigrams(run: str) -> Iterator[str]:
    characters = _CHARACTERS.findall(run)
    if len(characters) == 1:
        yield run
    for first, second in pairwise(characters):
        yield first + second
