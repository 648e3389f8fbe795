"""Records (objects with named fields) from files of every usual layout: what corpora and questions are read from.

    JSON Lines                      one object per line; blank lines are skipped
    JSON                            a list of objects, or `{"Data": [...]}`; read one by one, whatever its size
    .tsv, .csv                      a header with the names of the columns, then rows of text
    Parquet                         by its columns

Guarantees:
- text files may be compressed with gzip, begin with a byte order mark and end their lines in any way;
- a file is read whole or refused: a mistake is a `RetrieverError` that names the file and the line, element or row, and
  how to mend it. Nothing is repaired or skipped;
- memory is that of one record, which may have `MAX_RECORD_BYTES`.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from retriever_service.errors import RetrieverError
from retriever_service.passages.json_list import NotAList, elements

Record = Mapping[str, Any]
Numbered = Iterator[tuple[int, Record]]
Unit = Literal["line", "element", "row", "passage"]

MAX_RECORD_BYTES = 256 * 2**20
"""A longer line is none of a file of records: a list in one line without `[`, or no text at all."""

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_LIST = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*"Data"\s*:\s*)?\[')
_WIDE = re.compile(rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff|[\[{]\x00|\x00+[\[{]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DELIMITERS = {".tsv": "\t", ".csv": ","}

csv.field_size_limit(MAX_RECORD_BYTES)


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one source, once, each with its number from 1."""

    name: str
    unit: Unit
    numbered: Numbered

    def __iter__(self) -> Numbered:
        return self.numbered

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        return f"{self.name}:{number}" if self.unit == "line" else f"{self.name}: {self.unit} {number}"


def open_records(path: str | Path) -> Records:
    """The records of a file.

    Raises:
        RetrieverError: no such file, or one that cannot be read; while iterating, at the first mistake.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise RetrieverError(f"{path} does not exist")
    with _opened(path) as file, _explained(path):
        head = _head(file)
    if head.startswith(b"PAR1"):
        return Records(str(path), "row", _parquet(path))
    if _WIDE.match(head):
        raise RetrieverError(f"{path} is UTF-16 or UTF-32; save it as UTF-8 (iconv -f utf-16 -t utf-8)")
    if delimiter := _DELIMITERS.get(Path(path.name.removesuffix(".gz")).suffix.lower()):
        return Records(str(path), "line", _table(path, delimiter))
    if start := _LIST.match(head):
        return Records(str(path), "element", _list(path, start.end()))
    return Records(str(path), "line", _json_lines(path))


def parse_record(text: str, place: str) -> Record:
    """The object that a text stands for.

    Raises:
        RetrieverError: it is none; names the place.
    """
    record = _telling(place, json.loads, text)
    if not isinstance(record, dict):
        raise RetrieverError(f"{place}: expected a JSON object, got {type(record).__name__}")
    _check_unicode(record, text, place)
    return record


def _telling(place: str, parse: Callable[..., Any], *arguments: Any) -> Any:
    """What a parser of JSON gives, its failures in our words."""
    try:
        return parse(*arguments)
    except json.JSONDecodeError as error:
        raise RetrieverError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}); mend or remove it"
        ) from error
    except NotAList as error:
        raise RetrieverError(f"{place}: {error}; mend or remove it") from error
    except UnicodeDecodeError as error:
        raise RetrieverError(f"{place}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from error
    except RecursionError as error:
        raise RetrieverError(f"{place}: nested too deep to be read; flatten it") from error
    except ValueError as error:
        # The one other thing that Python's parser refuses.
        raise RetrieverError(f"{place}: a number of thousands of digits; put it in quotes") from error


def _check_unicode(record: Record, text: str, place: str) -> None:
    """A surrogate without its other half is no character: no tokenizer and no file takes it."""
    if _SURROGATE.search(text):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RetrieverError(
                f"{place}: not valid Unicode (half a surrogate pair, \\u{ord(error.object[error.start]):04x}); write "
                "the character that was meant"
            ) from error


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed where it is gzip, whatever its name."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(path, "rb") if compressed else open(path, "rb"))
    except OSError as error:
        raise RetrieverError(f"{path} cannot be read: {error.strerror}") from error


def _head(file: Any) -> bytes:
    head: bytes = file.peek(_HEAD_BYTES)
    return head[:_HEAD_BYTES]


class _explained:
    """Says of a damaged file what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.behind = path, 0

    def __enter__(self) -> _explained:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
            raise RetrieverError(
                f"{self.path}: damaged gzip file behind line {self.behind} ({error}); fetch or write it again"
            ) from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of every line of a file that is not blank.

    Raises:
        RetrieverError: while iterating, at the first mistake.
    """
    with _opened(path) as file, _explained(path) as reading:
        number = 0
        while block := file.readline(MAX_RECORD_BYTES + 1):
            if len(block) > MAX_RECORD_BYTES:
                raise RetrieverError(
                    f"{path}:{number + 1}: a line of more than {MAX_RECORD_BYTES:,} bytes; write one record per line"
                )
            # Where a carriage return alone ends lines, several are in one block.
            for line in (block.removeprefix(_BOM) if number == 0 else block).splitlines():
                number += 1
                reading.behind = number
                if line.strip():
                    yield number, _telling(f"{path}:{number}", line.decode, "utf-8")


def _json_lines(path: Path) -> Numbered:
    for number, line in read_lines(path):
        yield number, parse_record(line, f"{path}:{number}")


def _list(path: Path, skipped: int) -> Numbered:
    number = 0
    with _opened(path) as file, _explained(path):
        file.read(skipped)
        found = elements(file, MAX_RECORD_BYTES)
        while True:
            place = f"{path}: element {number + 1}"
            element = _telling(place, next, found, None)
            if element is None:
                return
            record, text = element
            _check_unicode(record, text, place)
            number += 1
            yield number, record


def _table(path: Path, delimiter: str) -> Numbered:
    rows = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if header is None:
                header = row
            elif len(row) != len(header):
                raise RetrieverError(
                    f"{path}:{rows.line_num}: {len(row)} columns, but the header has {len(header)}; mend the line, or "
                    "put what has a separator or a quote in it in quotes"
                )
            else:
                yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise RetrieverError(f"{path}:{rows.line_num}: not valid as a table ({error})") from error


def _parquet(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise RetrieverError(f"{path}: damaged Parquet file behind row {number} ({error})") from error
