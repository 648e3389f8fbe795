"""What happens to files: other encodings, half copies, tools that write something else, bits that flip."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping

Damage = Callable[[bytes], bytes]

LONG = 10 * 2**20
"""Bytes of the long line."""


def _text(change: Callable[[str], str]) -> Damage:
    """A change of text; what is no text stays as it is."""
    return lambda content: change(content.decode("utf-8", "surrogateescape")).encode(
        "utf-8", "surrogateescape"
    )


def _in_place_of_a_string(literal: str) -> Damage:
    """Another value of JSON where the first string value stands."""

    def change(text: str) -> str:
        before, colon, rest = text.partition(': "')
        _, _, after = rest.partition('"')
        return f"{before}: {literal}{after}" if colon else f"{literal}{text}"

    return _text(change)


def _in_a_string(literal: str) -> Damage:
    """Characters, as JSON writes them, at the beginning of the first string value."""
    return _text(lambda text: text.replace(': "', f': "{literal}', 1) if ': "' in text else literal + text)


def _cut(share: float) -> Damage:
    return lambda content: content[: int(len(content) * share)]


def _flipped(seed: int) -> Damage:
    def change(content: bytes) -> bytes:
        draw, changed = random.Random(seed), bytearray(content)
        for _ in range(3):
            if changed:
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    return change


def _overwritten(seed: int) -> Damage:
    """A block of random bytes somewhere, as of a bad sector."""

    def change(content: bytes) -> bytes:
        draw = random.Random(seed)
        at = draw.randrange(len(content) + 1)
        return content[:at] + draw.randbytes(64) + content[at + 64 :]

    return change


DAMAGES: Mapping[str, Damage] = {
    "as it is": lambda content: content,
    "empty": lambda content: b"",
    "white space": lambda content: b" \n\t\n\n",
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "UTF-16 without a mark": lambda content: content.decode("utf-8", "replace").encode("utf-16-le"),
    "UTF-32": lambda content: content.decode("utf-8", "replace").encode("utf-32"),
    "Latin-1": lambda content: content.replace(b'": "', b'": "\xe9', 1),
    "half a character": lambda content: content.replace(b'": "', b'": "\xe2\x82', 1),
    "NUL bytes": lambda content: content.replace(b'": "', b'": "\x00', 1),
    "nothing but NUL bytes": lambda content: bytes(len(content) or 1),
    "NUL bytes at the end": lambda content: content + bytes(512),
    "random bytes": lambda content: random.Random(0).randbytes(2048),
    "gzip": lambda content: gzip.compress(content, mtime=0),
    "gzip, cut short": lambda content: gzip.compress(content, mtime=0)[:-12],
    "gzip, damaged": lambda content: _flipped(1)(gzip.compress(content, mtime=0)),
    "gzip of nothing": lambda content: gzip.compress(b"", mtime=0),
    "line ends of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "line ends of old Macs": lambda content: content.replace(b"\n", b"\r"),
    "mixed line ends": lambda content: content.replace(b"\n", b"\r\n\r\n", 1),
    "no end of the last line": lambda content: content.rstrip(b"\n"),
    "twice": lambda content: content + content,
    "cut at a tenth": _cut(0.1),
    "cut in the middle": _cut(0.5),
    "cut at the end": lambda content: content[:-3],
    "bits flipped (1)": _flipped(1),
    "bits flipped (2)": _flipped(2),
    "bits flipped (3)": _flipped(3),
    "a bad sector (1)": _overwritten(1),
    "a bad sector (2)": _overwritten(2),
    "a line of 10 MB": _in_a_string("long " * (LONG // 5)),
    "10 MB without a line end": lambda content: b"x" * LONG,
    "nested deep": _in_place_of_a_string("[" * 5000 + "]" * 5000),
    "nested too deep": lambda content: b"[" * 200_000,
    "a number in place of a text": _in_place_of_a_string("7"),
    "null in place of a text": _in_place_of_a_string("null"),
    "a list in place of a text": _in_place_of_a_string("[1, 2]"),
    "an object in place of a text": _in_place_of_a_string('{"a": {}}'),
    "NaN": _in_place_of_a_string("NaN"),
    "Infinity": _in_place_of_a_string("-Infinity"),
    "a number of 5,002 digits": _in_place_of_a_string("7" * 5002),
    "half a surrogate pair": _in_a_string("\\ud83d"),
    "a control character": _in_a_string("\\u0007"),
    "an unknown escape": _in_a_string("\\x"),
    "a comma too many": _text(lambda text: text.replace("}", ",}", 1)),
    "keys without quotes": _text(lambda text: text.replace('"', "")),
    "single quotes": _text(lambda text: text.replace('"', "'")),
    "a list": lambda content: b"[]\n",
    "an object": lambda content: b"{}\n",
    "a list of numbers": lambda content: b"[1, 2, 3]\n",
    "a number": lambda content: b"3\n",
    "a string": lambda content: b'"text"\n',
    "null": lambda content: b"null\n",
    "a web page": lambda content: b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n",
    "a pointer of Git LFS": lambda content: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    ),
    "a picture": lambda content: b"\x89PNG\r\n\x1a\n" + random.Random(3).randbytes(256),
    "a pickle": lambda content: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "a table of text": lambda content: b"id\ttext\n1\tone\n2\n",
    "names of a list of files": lambda content: json.dumps({"files": ["a", "b"]}).encode(),
}
