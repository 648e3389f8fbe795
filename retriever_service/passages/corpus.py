"""Passages, the files they are read from, and the memory-mapped file they are served from.

Reading guarantees:
- passages come in the order of the sources, one at a time, whatever the size of the corpus;
- a mistake is a `RetrieverError` that names file and line: nothing is repaired or skipped;
- an id that comes again in another source with the same content is read once and counted in `num_duplicates`
  (corpora are often unions); the same id with other content, or twice in one source, is an error.

Serving guarantees: rows are read from disk pages that all processes of a machine share; opening costs no load
time.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from retriever_service.errors import RetrieverError
from retriever_service.passages.metadata import read_metadata
from retriever_service.passages.sources import open_source

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 16_384
_SCHEMA = pa.schema(
    [("id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("metadata", pa.string())]
)


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of text. `title` may be empty; `metadata` is any JSON object, and not searched in."""

    id: str
    title: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


PASSAGE_TEMPLATE = "{title} {text}"


def passage_text(passage: Passage, template: str = PASSAGE_TEMPLATE) -> str:
    """What is encoded of a passage: title and text as in `template`, or the text alone where there is no title."""
    return template.format(title=passage.title, text=passage.text) if passage.title else passage.text


def read_corpus(sources: Sequence[str | Path]) -> Iterator[Passage]:
    """The passages of `sources`, in order; see `CorpusReader`."""
    return iter(CorpusReader(sources))


def stream_corpus(sources: Sequence[str | Path]) -> Iterator[Passage]:
    """The passages of `sources`, in order, as they stand: what comes twice is not looked for, so the memory is that of
    one passage.

    Raises:
        RetrieverError: while iterating, at the first mistake.
    """
    for source in sources:
        records = open_source(str(source))
        for number, record in records:
            yield to_passage(record, records.place(number))


class CorpusReader:
    """Iterates over the union of corpus sources, once.

    A source is one of
    - a file of records (`open_records`: JSON Lines, a JSON list, a table, Parquet) in one of these dialects:
      `{"id", "title", "text"}`; `{"_id", "title", "text"}` (BEIR); `{"id", "contents"}` with the title,
      possibly in double quotes, on the first line of the contents (Pyserini, Search-R1); `{"id", "documentation"}`
      (ToolRet); `{"id", "doc"}` (MAIR); each may have `metadata`, a JSON object that results carry along and
      filters look at;
    - a directory that `datasets.Dataset.save_to_disk` wrote, with columns named as in the dialects;
    - a folder of texts (`text_folder`), cut into passages;
    - `hf:NAME[:CONFIG[:SPLIT]]`, a data set of the Hugging Face hub, streamed (split `train` unless named).

    After the iteration `num_passages`, `num_duplicates` and `checksum` describe what was read; the checksum
    depends on the ids, titles, texts and metadata and their order only. Until then duplicate detection holds
    every id and 16 bytes per passage.

    Raises:
        RetrieverError: while iterating, at the first mistake.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        if isinstance(sources, str | Path) or not sources:
            raise RetrieverError(
                f"a list with at least one corpus file or data set is needed, got {sources!r}"
            )
        self.sources = tuple(str(source) for source in sources)
        self.num_passages = 0
        self.num_duplicates = 0
        self._checksum = hashlib.sha256()
        self._places: list[Callable[[int], str]] = []
        self._ordinals: dict[str, int] = {}
        # Parallel to the ordinals: compact arrays instead of tuples keep a 21M-passage union small.
        self._numbers = array("Q")
        self._digests = array("Q")
        self._source_starts: list[int] = []

    @property
    def checksum(self) -> str:
        return self._checksum.hexdigest()

    def __iter__(self) -> Iterator[Passage]:
        for source in self.sources:
            self._source_starts.append(self.num_passages)
            before = self.num_duplicates
            count = 0
            records = open_source(source)
            self._places.append(records.place)
            for number, record in records:
                count += 1
                passage = to_passage(record, records.place(number))
                if self._is_new(passage, number):
                    yield passage
            if count == 0:
                raise RetrieverError(f"{source}: no passages; the corpus is empty. Name a file with passages")
            if self.num_duplicates > before:
                logger.info(
                    f"{source}: {self.num_duplicates - before} of {count} passages were in earlier sources"
                )
        self._ordinals.clear()
        del self._numbers[:], self._digests[:]

    def _is_new(self, passage: Passage, number: int) -> bool:
        words = words_hash(passage)
        first = self._ordinals.get(passage.id)
        if first is None:
            self._ordinals[passage.id] = self.num_passages
            self.num_passages += 1
            self._numbers.append(number)
            self._digests.append(words)
            self._checksum.update(_content_digest(passage))
            return True
        in_this_source = first >= self._source_starts[-1]
        if in_this_source or self._digests[first] != words:
            source = sum(start <= first for start in self._source_starts) - 1
            problem = "appears twice" if in_this_source else "has different content in two sources"
            raise RetrieverError(
                f"{self._places[-1](number)}: id {passage.id!r} {problem}; first at "
                f"{self._places[source](self._numbers[first])}. Give every passage its own id"
            )
        self.num_duplicates += 1
        return False


def _content_digest(passage: Passage) -> bytes:
    """SHA-256 over the fields, each behind its length so that no two passages share an encoding."""
    digest = hashlib.sha256()
    for value in (passage.id, passage.title, passage.text, *_metadata_json(passage)):
        encoded = value.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _metadata_json(passage: Passage) -> tuple[str, ...]:
    """The metadata in one spelling, if there are any."""
    return (json.dumps(passage.metadata, sort_keys=True),) if passage.metadata else ()


def words_hash(passage: Passage) -> int:
    """64 bits of the letters and digits only: copies of a passage often differ in spacing and punctuation."""
    folded = unicodedata.normalize("NFKC", f"{passage.title} {passage.text}").casefold()
    letters = re.sub(r"[\W_]+", "", folded)
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "little")


def to_passage(record: Mapping[str, Any], where: str) -> Passage:
    """The passage that one record of any dialect stands for.

    Raises:
        RetrieverError: it is none, or its id or its text is empty.
    """
    passage = read_passage(record, where)
    if not passage.id:
        raise RetrieverError(f"{where}: the id is empty")
    if not passage.text.strip():
        raise RetrieverError(f"{where}: passage {passage.id!r} has no text")
    return passage


def read_passage(record: Mapping[str, Any], where: str) -> Passage:
    """As `to_passage`, but id and text may be empty."""
    id_ = _id(record, where)
    if "contents" in record and "text" not in record:
        title, newline, text = _string(record, "contents", where).partition("\n")
        if not newline:
            title, text = "", title
        if len(title) >= 2 and title.startswith('"') and title.endswith('"'):
            title = title[1:-1]
    else:
        key = next((key for key in ("text", "documentation", "doc") if key in record), "text")
        text = _string(record, key, where)
        title = "" if record.get("title") is None else _string(record, "title", where)
    return Passage(id=id_, title=title, text=text, metadata=read_metadata(record, where))


def _id(record: Mapping[str, Any], where: str) -> str:
    """Whole numbers are ids as well."""
    key = "_id" if "_id" in record and "id" not in record else "id"
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(record, key, where)


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise RetrieverError(
            f"{where}: no field {key!r} (fields: {', '.join(sorted(record))[:200] or 'none'}); a passage needs "
            "id and text, or id and contents"
        )
    value = record[key]
    if not isinstance(value, str):
        raise RetrieverError(f"{where}: field {key!r} must be a string, is {type(value).__name__}")
    return value


def write_passages(passages: Iterable[Passage], path: Path) -> None:
    """Write the Arrow IPC file that `Corpus` opens. Memory: one batch."""
    columns: tuple[list[str | None], ...] = tuple([] for _ in _SCHEMA)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:

        def flush() -> None:
            writer.write_batch(pa.record_batch(list(columns), schema=_SCHEMA))
            for column in columns:
                column.clear()

        for passage in passages:
            row = (passage.id, passage.title, passage.text, *(_metadata_json(passage) or (None,)))
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            if len(columns[0]) == ROWS_PER_BATCH:
                flush()
        if columns[0]:
            flush()


class Corpus:
    """Random access by row (0-based) to files of `write_passages`, one behind the other, memory-mapped.

    Iteration is in row order.

    Raises:
        RetrieverError: a file is missing, damaged or not of this form.
    """

    def __init__(self, *paths: Path) -> None:
        self._files = [_PassageFile(path) for path in paths]
        self._ends = list(itertools.accumulate(len(file) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        number = bisect.bisect_right(self._ends, row)
        return self._files[number][row - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Passage]:
        for file in self._files:
            yield from file

    def write_rows(self, start: int, stop: int, path: Path) -> None:
        """Write rows [start, stop) as `write_passages` would, without making passages of them. Memory: one batch."""
        rows = pa.Table.from_batches([batch for file in self._files for batch in file.batches], _SCHEMA)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            for first in range(start, stop, ROWS_PER_BATCH):
                # One chunk, so that it is one batch of the file.
                writer.write_table(rows.slice(first, min(ROWS_PER_BATCH, stop - first)).combine_chunks())

    def column(self, name: Literal["id", "title", "text", "metadata"]) -> pa.ChunkedArray:
        """One field of all passages; `metadata` as JSON text, null where there is none."""
        index = _SCHEMA.get_field_index(name)
        chunks = [batch.column(index) for file in self._files for batch in file.batches]
        return pa.chunked_array(chunks, pa.string())


class _PassageFile:
    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise RetrieverError(f"{path}: cannot be read ({error}); build the index again") from error
        if reader.schema != _SCHEMA or any(batch.num_rows != ROWS_PER_BATCH for batch in batches[:-1]):
            raise RetrieverError(f"{path}: not a passage file of this version; build the index again")
        self._path, self.batches = path, batches
        self._length: int = sum(batch.num_rows for batch in batches)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Passage:
        batch, offset = self.batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH
        with self._telling():
            return _from_columns(*(column[offset].as_py() for column in batch.columns))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.batches:
            with self._telling():
                passages = [_from_columns(**row) for row in batch.to_pylist()]
            yield from passages

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Bytes that have changed since they were written."""
        try:
            yield
        except ValueError as error:
            raise RetrieverError(f"{self._path}: damaged ({error!s:.200}); build the index again") from error


def _from_columns(id: str, title: str, text: str, metadata: str | None) -> Passage:
    return Passage(id, title, text, json.loads(metadata) if metadata else {})
