"""Passages from a folder of texts: one's own notes, manuals, articles.

Guarantees: files in the order of their paths, whatever the file system; no word is lost or comes twice, but for the
title and the marks of headings; the same folder gives the same passages and ids.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retriever_service.errors import RetrieverError
from retriever_service.passages.records import Numbered, read_lines

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md")
WORDS = 100
"""A passage has about so many; a longer paragraph is cut at the ends of its sentences."""

_FEW_WORDS = 15
"""With fewer a paragraph goes with the next one."""
_TITLE_WORDS = 12
_LETTERS = 8
"""In a word and the space behind it, where a script has no spaces to count."""
_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[\u3002\uff01\uff1f])")


def text_files(folder: Path) -> list[Path]:
    """The texts below a folder, in order; hidden files and folders are left out."""
    return sorted(filter(_is_text, _visible_files(folder)))


def read_text_folder(folder: Path) -> Numbered:
    """(number from 1, {id, title, text}) of the passages of all texts below a folder.

    The id is the path from the folder and the number of the passage in its file (`notes/harps.md#2`). The title is the
    heading that a Markdown file begins with, the short line that any other begins with, or the name of the file.
    Further headings begin a passage. Files without words, and those that are no texts, are left out and told of in the
    log.

    Raises:
        RetrieverError: while iterating, at a file that is not UTF-8; a folder without any words.
    """
    there = list(_visible_files(folder))
    number, empty, files = 0, 0, sorted(filter(_is_text, there))
    for path in files:
        title, paragraphs = _title_and_paragraphs(path)
        empty += not paragraphs
        for place, text in enumerate(_passages(paragraphs), start=1):
            number += 1
            yield (
                number,
                {"id": f"{path.relative_to(folder).as_posix()}#{place}", "title": title, "text": text},
            )
    if number == 0:
        raise RetrieverError(f"{folder}: there are no words in its {' and '.join(SUFFIXES)} files")
    if empty:
        logger.warning(f"{folder}: {empty} of {len(files)} files have no words, or none but a title")
    if others := Counter(path.suffix.lower() or "no suffix" for path in there if not _is_text(path)):
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning(
            f"{folder}: {others.total()} files that are not {' or '.join(SUFFIXES)} are left out ({kinds}); convert "
            "them if they belong to the corpus"
        )


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


@dataclass(slots=True)
class _Paragraph:
    text: str
    is_heading: bool
    lines: int = 1


def _title_and_paragraphs(path: Path) -> tuple[str, list[_Paragraph]]:
    """Lines without a blank one between them are a paragraph; the heading that a file begins with is its title."""
    title, paragraphs, last = "", list[_Paragraph](), 0
    for number, line in read_lines(path):
        heading = _HEADING.match(line.strip()) if path.suffix.lower() == ".md" else None
        text = heading[1] if heading else " ".join(line.split())
        if heading and not title and not paragraphs:
            title = text
        elif heading or number > last + 1 or not paragraphs or paragraphs[-1].is_heading:
            paragraphs.append(_Paragraph(text, heading is not None))
        else:
            paragraphs[-1].text += f" {text}"
            paragraphs[-1].lines += 1
        last = number
    if not title and len(paragraphs) > 1 and _is_title(paragraphs[0]):
        title = paragraphs.pop(0).text
    return title or path.stem, [paragraph for paragraph in paragraphs if paragraph.text]


def _is_title(first: _Paragraph) -> bool:
    """One short line without the end of a sentence."""
    is_short = first.lines == 1 and _size(first.text) <= _TITLE_WORDS
    return is_short and not first.is_heading and not _SENTENCE_END.search(f"{first.text} ")


def _passages(paragraphs: Sequence[_Paragraph]) -> Iterator[str]:
    """Paragraphs together, as long as they have no more words than a passage has; no heading stands alone."""
    held: list[_Paragraph] = []
    for paragraph in paragraphs:
        for piece in _pieces(paragraph.text):
            size = sum(_size(one.text) for one in held)
            full = size >= _FEW_WORDS and size + _size(piece) > WORDS
            if (full or paragraph.is_heading) and not all(one.is_heading for one in held):
                yield _together(held)
                held = []
            held.append(_Paragraph(piece, paragraph.is_heading))
    if held:
        yield _together(held)


def _together(paragraphs: Sequence[_Paragraph]) -> str:
    return "\n".join(paragraph.text for paragraph in paragraphs)


def _pieces(paragraph: str) -> Iterator[str]:
    """A paragraph, or groups of sentences of one that is long."""
    if _size(paragraph) <= WORDS * 3 // 2:
        yield paragraph
        return
    held = ""
    for sentence in _SENTENCE_END.split(paragraph):
        for part in textwrap.wrap(sentence, WORDS * _LETTERS) if _size(sentence) > WORDS else [sentence]:
            if held and _size(held) + _size(part) > WORDS:
                yield held.strip()
                held = ""
            held += part
    yield held.strip()


def _size(text: str) -> int:
    """In words, or what would be words in a script without spaces."""
    return max(len(text.split()), len(text) // _LETTERS)
