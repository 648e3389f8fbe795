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

import gzip
import hashlib
import json
import logging
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
ROWS_PER_BATCH = 16_384
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of text. `title` may be empty."""

    id: str
    title: str
    text: str


def read_corpus(sources: Sequence[str | Path]) -> Iterator[Passage]:
    """The passages of `sources`, in order; see `CorpusReader`."""
    return iter(CorpusReader(sources))


class CorpusReader:
    """Iterates over the union of corpus sources, once.

    A source is one of
    - a JSON Lines file (`.gz` allowed), one object per line in one of three dialects:
      `{"id", "title", "text"}`; `{"_id", "title", "text"}` (BEIR); `{"id", "contents"}` with the title,
      possibly in double quotes, on the first line of the contents (Pyserini, Search-R1);
    - a directory that `datasets.Dataset.save_to_disk` wrote, with columns named as in the dialects;
    - `hf:NAME[:CONFIG[:SPLIT]]`, a data set of the Hugging Face hub, streamed (split `train` unless named).

    After the iteration `num_passages`, `num_duplicates` and `checksum` describe what was read; the checksum
    depends on the ids, titles and texts and their order only. Until then duplicate detection holds every id and
    16 bytes per passage.

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
        self._ordinals: dict[str, int] = {}
        # Parallel to the ordinals: compact arrays instead of tuples keep a 21M-passage union small.
        self._lines = array("Q")
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
            for line, record in _read_records(source):
                count += 1
                passage = _to_passage(record, f"{source}:{line}")
                if self._is_new(passage, source, line):
                    yield passage
            if count == 0:
                raise RetrieverError(f"{source}: no passages; the corpus is empty. Name a file with passages")
            if self.num_duplicates > before:
                logger.info(
                    f"{source}: {self.num_duplicates - before} of {count} passages were in earlier sources"
                )
        self._ordinals.clear()
        del self._lines[:], self._digests[:]

    def _is_new(self, passage: Passage, source: str, line: int) -> bool:
        try:
            digest = _content_digest(passage)
        except UnicodeEncodeError as error:
            raise RetrieverError(f"{source}:{line}: not valid Unicode (lone surrogate): {error}") from error
        words_hash = _words_hash(passage)
        first = self._ordinals.get(passage.id)
        if first is None:
            self._ordinals[passage.id] = self.num_passages
            self.num_passages += 1
            self._lines.append(line)
            self._digests.append(words_hash)
            self._checksum.update(digest)
            return True
        in_this_source = first >= self._source_starts[-1]
        if in_this_source or self._digests[first] != words_hash:
            position = sum(start <= first for start in self._source_starts) - 1
            problem = "appears twice" if in_this_source else "has different content in two sources"
            raise RetrieverError(
                f"{source}:{line}: id {passage.id!r} {problem}; first at {self.sources[position]}:"
                f"{self._lines[first]}. Give every passage its own id"
            )
        self.num_duplicates += 1
        return False


def _content_digest(passage: Passage) -> bytes:
    """SHA-256 over the three fields, each behind its length so that no two passages share an encoding."""
    digest = hashlib.sha256()
    for field in (passage.id, passage.title, passage.text):
        encoded = field.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _words_hash(passage: Passage) -> int:
    """64 bits of the letters and digits only: copies of a passage often differ in spacing and punctuation."""
    folded = unicodedata.normalize("NFKC", f"{passage.title} {passage.text}").casefold()
    letters = re.sub(r"[\W_]+", "", folded)
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "little")


def _read_records(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row number from 1, record) pairs of one source."""
    if source.startswith(HUB_PREFIX):
        return _read_hub(source)
    path = Path(source)
    if path.is_dir():
        return _read_saved_dataset(path)
    if not path.is_file():
        raise RetrieverError(
            f"corpus {source} does not exist; relative paths begin at data.root, or at the working directory"
        )
    return _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                record = json.loads(line.decode("utf-8"))
                if not isinstance(record, dict):
                    raise RetrieverError(
                        f"{path}:{number}: expected a JSON object, got {type(record).__name__}"
                    )
                yield number, record
    except json.JSONDecodeError as error:
        raise RetrieverError(
            f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the line"
        ) from error
    except UnicodeDecodeError as error:
        raise RetrieverError(f"{path}:{number}: not valid UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RetrieverError(f"{path}: damaged gzip file behind line {number}: {error}") from error


def _read_saved_dataset(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise RetrieverError(f"{path}: not a directory written by datasets' save_to_disk: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            raise RetrieverError(f"{path} holds the splits {sorted(dataset)}; name one of their directories")
        dataset = next(iter(dataset.values()))
    yield from enumerate(dataset, start=1)


def _read_hub(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    name, config, split, *rest = [*source.removeprefix(HUB_PREFIX).split(":"), "", ""]
    if not name or any(rest):
        raise RetrieverError(f"{source}: expected {HUB_PREFIX}NAME[:CONFIG[:SPLIT]]")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise RetrieverError(f"{source}: cannot be opened: {error}") from error
    yield from enumerate(dataset, start=1)


def _to_passage(record: Mapping[str, Any], where: str) -> Passage:
    """The passage that one record of any dialect stands for."""
    id_ = _string(record, "_id" if "_id" in record and "id" not in record else "id", where)
    if "contents" in record and "text" not in record:
        title, newline, text = _string(record, "contents", where).partition("\n")
        if not newline:
            title, text = "", title
        if len(title) >= 2 and title.startswith('"') and title.endswith('"'):
            title = title[1:-1]
    else:
        text = _string(record, "text", where)
        title = "" if record.get("title") is None else _string(record, "title", where)
    if not id_:
        raise RetrieverError(f"{where}: the id is empty")
    if not text.strip():
        raise RetrieverError(f"{where}: passage {id_!r} has no text")
    return Passage(id=id_, title=title, text=text)


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise RetrieverError(
            f"{where}: no field {key!r} (fields: {', '.join(sorted(record)) or 'none'}); a passage needs "
            "id and text, or id and contents"
        )
    value = record[key]
    if not isinstance(value, str):
        raise RetrieverError(f"{where}: field {key!r} must be a string, is {type(value).__name__}")
    return value


def write_passages(passages: Iterable[Passage], path: Path) -> None:
    """Write the Arrow IPC file that `Corpus` opens. Memory: one batch."""
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:

        def flush() -> None:
            writer.write_batch(pa.record_batch(list(columns), schema=_SCHEMA))
            for column in columns:
                column.clear()

        for passage in passages:
            for column, value in zip(columns, (passage.id, passage.title, passage.text), strict=True):
                column.append(value)
            if len(columns[0]) == ROWS_PER_BATCH:
                flush()
        if columns[0]:
            flush()


class Corpus:
    """Random access by row (0-based) to a file of `write_passages`, memory-mapped; iteration is in row order.

    Raises:
        RetrieverError: the file is missing, damaged or not of this form.
    """

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise RetrieverError(f"{path}: cannot be read ({error}); build the index again") from error
        if reader.schema != _SCHEMA or any(batch.num_rows != ROWS_PER_BATCH for batch in batches[:-1]):
            raise RetrieverError(f"{path}: not a passage file of this version; build the index again")
        self._batches = batches
        self._length: int = sum(batch.num_rows for batch in batches)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of a corpus of {self._length} passages")
        batch, offset = self._batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH
        return Passage(*(column[offset].as_py() for column in batch.columns))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self._batches:
            for row in batch.to_pylist():
                yield Passage(**row)
