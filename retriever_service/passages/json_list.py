"""A JSON list, element by element: some data sets are one list of half a gigabyte."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK_BYTES = 2**20
_SPACE = " \t\r\n"
_SHOWN_CHARS = 40


class NotAList(ValueError):
    """What stands there is no list of objects."""


def elements(file: BinaryIO, max_chars: int) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, its text) of the elements of a list in UTF-8.

    Args:
        file: behind the opening bracket.
        max_chars: the longest element.

    Raises:
        NotAList: an element is none, or too long, or the list does not end.
        ValueError, RecursionError: as Python's parser of JSON and decoder of UTF-8 do.
    """
    text, decoder = _Text(file, max_chars), json.JSONDecoder()
    sign = text.next_sign()
    while sign != "]":
        if sign != "{":
            raise NotAList(f"expected a JSON object, got {text.shown()}")
        element, stop = _element(text, decoder)
        yield element, text.chars[text.at : stop]
        text.at = stop
        sign = text.next_sign()
        if sign not in (",", "]"):
            raise NotAList(f"expected a comma or the end of the list in front of it, got {text.shown()}")
        if sign == ",":
            text.at += 1
            sign = text.next_sign()
    text.at += 1
    # Where the list is a field of an object, others may follow.
    if text.next_sign() not in ("", ",", "}"):
        raise NotAList(f"behind the end of the list there is {text.shown()}")


def _element(text: _Text, decoder: json.JSONDecoder) -> tuple[dict[str, Any], int]:
    while True:
        try:
            return decoder.raw_decode(text.chars, text.at)
        except json.JSONDecodeError as error:
            # It may only be that the rest has not been read yet.
            if not text.read_on():
                at = max(text.at, error.pos - _SHOWN_CHARS // 2)
                raise NotAList(
                    f"not valid JSON ({error.msg} at {text.chars[at : at + _SHOWN_CHARS]!r})"
                ) from error


class _Text:
    """The characters that were read; those in front of `at` are done with."""

    def __init__(self, file: BinaryIO, max_chars: int) -> None:
        self._file = file
        self._max_chars = max_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.chars = ""
        self.at = 0

    def read_on(self) -> bool:
        """Read at least as much again as there is. False: the file has ended."""
        waiting = len(self.chars) - self.at
        if waiting > self._max_chars:
            raise NotAList(f"longer than {self._max_chars:,} characters, or not valid JSON")
        block = self._file.read(max(CHUNK_BYTES, waiting))
        more = self._decoder.decode(block, final=not block)
        self.chars, self.at = self.chars[self.at :] + more, 0
        return bool(block)

    def next_sign(self) -> str:
        """The next character that is no space, which is not used up; empty at the end of the file."""
        while True:
            while self.at < len(self.chars) and self.chars[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.chars) or not self.read_on():
                return self.chars[self.at : self.at + 1]

    def shown(self) -> str:
        """What comes next, for a message."""
        return (
            repr(self.chars[self.at : self.at + _SHOWN_CHARS]) if self.next_sign() else "the end of the file"
        )
