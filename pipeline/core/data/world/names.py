"""Invented, pronounceable, unique names.

Guarantees:
- `NameForge.word` is a bijection from sequence numbers to words, so uniqueness needs no memory.
- Every word belongs to exactly one partition, decided by the parity of its spelling parts (`partition_of`).
  Two partitions share no word, whatever their seeds.
- Words 2j and 2j + 1 share everything but the ending ("Velmar", "Velmos"): look-alike distractors.
"""

import math
import re
from dataclasses import dataclass

PARTITIONS = ("default", "pretrain")

_MASK64 = (1 << 64) - 1
_ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "tr",
    "v",
)
_VOWELS = ("a", "e", "i", "o", "u")
_MIDDLES = (
    "b", "d", "g", "k", "l", "lb", "ld", "lm", "lt", "lv", "m", "mb",
    "n", "nd", "nt", "r", "rd", "rg", "rk", "rm", "rn", "s", "st", "v",
)  # fmt: skip
_CODAS = ("", "l", "m", "n", "r", "s", "t", "x")
_STEMS = {2: len(_ONSETS) * 5 * len(_MIDDLES), 3: len(_ONSETS) * 5 * len(_MIDDLES) * 5 * len(_MIDDLES)}
_ENDING_PAIRS = len(_VOWELS) * len(_CODAS) // 4
_WORD = re.compile(
    rf"({'|'.join(sorted(_ONSETS, key=len, reverse=True))})([aeiou])((?:[^aeiou]+[aeiou])+)([^aeiou]?)"
)
_MIDDLE_VOWEL = re.compile(r"([^aeiou]+)([aeiou])")


def _endings(parity: int) -> tuple[str, ...]:
    """All endings (vowel + coda) of one parity; neighbours differ in both letters."""
    codas = len(_CODAS)
    return tuple(
        _VOWELS[(coda + shift) % 5] + _CODAS[coda]
        for shift in range(5)
        for coda in range(codas)
        if ((coda + shift) % 5 + coda) % 2 == parity
    )


_ENDINGS = (_endings(0), _endings(1))


def mix(value: int) -> int:
    """A 64-bit integer that looks random, from any integer (the SplitMix64 finaliser, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Permutation:
    """A keyed bijection of range(size), `i -> (a * i + b) % size` with `a` coprime to `size`; O(1) memory."""

    __slots__ = ("_inverse", "_multiplier", "_offset", "size")

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        multiplier = mix(key) % size
        while math.gcd(multiplier, size) != 1:
            multiplier = (multiplier + 1) % size
        self._multiplier = multiplier
        self._offset = mix(key + 1) % size
        self._inverse = pow(multiplier, -1, size)

    def __call__(self, index: int) -> int:
        return (self._multiplier * index + self._offset) % self.size

    def invert(self, value: int) -> int:
        return (self._inverse * (value - self._offset)) % self.size


@dataclass(frozen=True, slots=True)
class _Stem:
    text: str
    parity: int


def _stem(index: int, syllables: int) -> _Stem:
    index, onset = divmod(index, len(_ONSETS))
    onset = (onset + mix(index)) % len(_ONSETS)  # else successive words would walk through the alphabet
    text, parity = _ONSETS[onset], onset
    for _ in range(syllables - 1):
        index, vowel = divmod(index, 5)
        index, middle = divmod(index, len(_MIDDLES))
        text += _VOWELS[vowel] + _MIDDLES[middle]
        parity += vowel + middle
    return _Stem(text, parity & 1)


class NameForge:
    """Words of one (key, partition): `word(0) .. word(num_words - 1)` are all different.

    Two syllables while they suffice (about 48,000 words), else three (about 5.7 million).
    """

    def __init__(self, key: int, partition: str, num_words: int) -> None:
        num_pairs = (num_words + 1) // 2
        self._parity = PARTITIONS.index(partition)
        self._syllables = 2 if num_pairs <= _STEMS[2] * _ENDING_PAIRS else 3
        self._num_stems = _STEMS[self._syllables]
        self._order = Permutation(self._num_stems * _ENDING_PAIRS, key)
        if num_pairs > self._order.size:
            raise ValueError(f"{num_words} words asked for, only {2 * self._order.size} exist")

    def word(self, number: int) -> str:
        """The capitalised word with this sequence number."""
        pair, stem_index = divmod(self._order(number >> 1), self._num_stems)
        stem = _stem(stem_index, self._syllables)
        endings = _ENDINGS[stem.parity ^ self._parity]
        return (stem.text + endings[(2 * pair + (number & 1) + stem_index) % len(endings)]).capitalize()


def partition_of(word: str) -> str:
    """The one partition in which this word may appear. Raises ValueError if no forge makes it."""
    match = _WORD.fullmatch(word.lower())
    if match is None:
        raise ValueError(f"{word!r} is not an invented word")
    onset, first_vowel, rest, coda = match.groups()
    parity = _ONSETS.index(onset) + _VOWELS.index(first_vowel) + _CODAS.index(coda)
    for middle, vowel in _MIDDLE_VOWEL.findall(rest):
        parity += _MIDDLES.index(middle) + _VOWELS.index(vowel)
    return PARTITIONS[parity & 1]
