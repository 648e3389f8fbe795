"""A corpus as vectors: a directory of shards, each whole or absent.

    VECTORS/
      passages.arrow      id, title, text, metadata by row (see `corpus.Corpus`)
      shards/00000.npy    the vectors of the first rows, [rows, dimension], in numpy's format
      shards/00000.json   its rows, size and SHA-256, written behind it
      ...
      job.json            what is being made; written before the first shard
      manifest.json       the same and all shards; written last

Guarantees:
- a directory with a manifest is complete, and `open` finds every file in its recorded size;
- vectors are read by plain file reads, not mapped: resident memory is what was asked for, whatever the corpus.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from retriever_service.choices import StoreDtype
from retriever_service.encoding.encoder import EncoderSpec, Vectors
from retriever_service.errors import RetrieverError
from retriever_service.files import FileRecord, check_contents, check_size, json_object
from retriever_service.passages.corpus import Corpus

FORMAT_VERSION = 1
PASSAGES_FILE, SHARDS_DIR, JOB_FILE, MANIFEST_FILE = "passages.arrow", "shards", "job.json", "manifest.json"
MEND = "remove it (and manifest.json, if there is one) and encode again: only what is missing is made anew"
_GAP_ROWS, _SPAN_ROWS = 16, 4_096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows in a file of their own."""

    name: str
    """Of the file, within `shards/`."""
    first_row: int
    rows: int
    record: FileRecord


@dataclass(frozen=True, slots=True)
class Contents:
    """What a store holds, or will hold once it is complete; the contents of `job.json`."""

    version: int
    count: int
    """Passages."""
    dimension: int
    dtype: StoreDtype
    """Of the stored vectors."""
    shard_rows: int
    """Rows of every shard but the last, which may have fewer."""
    encoder: EncoderSpec
    """Model, prefixes, normalisation, most tokens and dtype of the weights; nothing is None."""
    encoder_fingerprint: str
    pooling: str
    """How vectors of tokens became one: "mean", "cls", ..."""
    corpus_sources: tuple[str, ...]
    corpus_checksum: str
    """SHA-256 over the passages in order; see `corpus.CorpusReader`."""
    num_duplicates: int
    """Passages left out because an earlier source had them with the same id and content."""
    passages: FileRecord
    """Of `passages.arrow`."""

    @property
    def row_bytes(self) -> int:
        """Of one stored vector."""
        return self.dimension * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Job:
    """A store in the making. Can be sent to other processes, and to machines that see the directory."""

    directory: Path
    contents: Contents

    @property
    def num_shards(self) -> int:
        return -(-self.contents.count // self.contents.shard_rows)

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        first = number * self.contents.shard_rows
        return range(first, min(first + self.contents.shard_rows, self.contents.count))

    def files(self, number: int) -> tuple[Path, Path]:
        """Vectors and record of a shard."""
        vectors = self.directory / SHARDS_DIR / f"{number:05d}.npy"
        return vectors, vectors.with_suffix(".json")


@dataclass(frozen=True, slots=True)
class VectorsManifest(Contents):
    """The contents of `manifest.json`."""

    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """Identity of passages and vectors."""
        parts = (self.corpus_checksum, self.encoder_fingerprint, *(s.record.sha256 for s in self.shards))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class VectorStore:
    """The vectors of a corpus, by row. Reading from several threads is safe.

    manifest: what it holds.
    """

    def __init__(self, directory: Path, manifest: VectorsManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._first_rows = [shard.first_row for shard in manifest.shards]

    @classmethod
    def open(cls, directory: str | Path) -> VectorStore:
        """Open a complete store; reads no vectors.

        Raises:
            RetrieverError: there is none, it is not complete, or a file is missing or cut short.
        """
        path = Path(directory)
        if not (path / MANIFEST_FILE).exists():
            begun = (path / JOB_FILE).exists()
            raise RetrieverError(
                f"{path}: encoding is not finished; run the same command again"
                if begun
                else f"{path} holds no vectors; encode a corpus, or name another directory"
            )
        store = cls(path, read_record(path / MANIFEST_FILE, VectorsManifest, MEND))
        for file, record in store._files():
            check_size(file, record, MEND)
        return store

    def __len__(self) -> int:
        return self.manifest.count

    @cached_property
    def corpus(self) -> Corpus:
        """The passages, in the order of the vectors."""
        return Corpus(self.directory / PASSAGES_FILE)

    def read(self, start: int, stop: int) -> Vectors:
        """The vectors of rows `start` to `stop` - 1: a copy, [stop - start, dimension].

        Raises:
            RetrieverError: a file was removed or cut short meanwhile.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of {len(self)} vectors")
        vectors = np.empty((stop - start, self.manifest.dimension), dtype=np.float32)
        row = start
        while row < stop:
            shard = self.manifest.shards[bisect.bisect_right(self._first_rows, row) - 1]
            end = min(stop, shard.first_row + shard.rows)
            vectors[row - start : end - start] = self._read_shard(shard, row, end)
            row = end
        return vectors

    def sample(self, rows: npt.ArrayLike) -> Vectors:
        """The vectors of `rows`, which ascend: a copy, [len(rows), dimension].

        Raises:
            RetrieverError: see `read`.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        vectors = np.empty((len(wanted), self.manifest.dimension), dtype=np.float32)
        steps = np.diff(wanted)
        if (steps < 0).any():
            raise ValueError("rows must ascend")
        # Neighbours share a read, which stays small.
        apart = (steps > _GAP_ROWS) | (np.diff(wanted // _SPAN_ROWS) > 0)
        for span in np.split(np.arange(len(wanted)), np.flatnonzero(apart) + 1):
            if len(span):
                first, last = int(wanted[span[0]]), int(wanted[span[-1]])
                vectors[span] = self.read(first, last + 1)[wanted[span] - first]
        return vectors

    def verify(self) -> None:
        """Read every byte of the store and compare it with the manifest.

        Raises:
            RetrieverError: names the file that is missing, cut short or changed.
        """
        for file, record in self._files():
            check_contents(file, record, MEND)

    def _files(self) -> list[tuple[Path, FileRecord]]:
        shards = [(self.directory / SHARDS_DIR / shard.name, shard.record) for shard in self.manifest.shards]
        return [(self.directory / PASSAGES_FILE, self.manifest.passages), *shards]

    def _read_shard(self, shard: Shard, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of the corpus that are all in `shard`, as they are stored."""
        path = self.directory / SHARDS_DIR / shard.name
        row_bytes, dimension = self.manifest.row_bytes, self.manifest.dimension
        header_bytes = shard.record.bytes - shard.rows * row_bytes
        offset = header_bytes + (start - shard.first_row) * row_bytes
        try:
            values = np.fromfile(path, self.manifest.dtype, (stop - start) * dimension, offset=offset)
        except OSError as error:
            raise RetrieverError(f"{path}: cannot be read ({error}); {MEND}") from error
        if len(values) != (stop - start) * dimension:
            raise RetrieverError(f"{path} was cut short; {MEND}")
        return values.reshape(stop - start, dimension)


def read_record(path: Path, kind: type[T], mend: str) -> T:
    """A dataclass from the JSON file that `files.write_json` made of it.

    Raises:
        RetrieverError: the file is missing, damaged or of another version; says so, and `mend`.
    """
    try:
        value = json_object(path.read_bytes())
        version = value.get("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise RetrieverError(f"{path}: format {version!r}, this program reads {FORMAT_VERSION}; {mend}")
        return TypeAdapter(kind).validate_python(value)
    except OSError as error:
        raise RetrieverError(f"{path}: cannot be read ({error}); {mend}") from error
    except RetrieverError:
        raise
    except ValueError as error:  # pydantic's ValidationError is one
        raise RetrieverError(f"{path} is damaged ({error!s:.200}); {mend}") from error
