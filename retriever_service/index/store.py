"""An index directory: what it holds, opening it, checking it.

    INDEX/
      manifest.json       what the index is: replaced as a whole, so that every reader sees one state
      segments/0000/      index.faiss (vectors) and passages.arrow (their passages), in the same row order
      segments/0001/      further ones: because of a memory bound, or added later
      tombstones-3.npy    rows that were deleted
      bm25-3/             the word index, if there is one

Guarantees:
- files never change once they are written; a new state is new files and a new manifest;
- rows are numbered through all segments; a deleted passage keeps its row;
- an index is opened only with the encoder that it was built with, and only if its files have their recorded
  sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retriever_service.encoding.encoder import EncoderSpec, TextEncoder
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    FileRecord,
    check_contents,
    check_size,
    fsync,
    json_object,
    telling_of_room,
    write_json,
)
from retriever_service.passages.corpus import Corpus
from retriever_service.passages.ranked import Mask

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
INDEX_FILE, PASSAGES_FILE = "index.faiss", "passages.arrow"
METRIC = "inner_product"
FLAT = "Flat"
"""FAISS's exact index."""
MEND = "build the index again"
_BLOCK_BYTES = 1 << 20
_OPEN_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of rows that were indexed together."""

    name: str
    """Its directory, relative to the index."""
    count: int
    """Passages."""
    factory: str
    """FAISS index factory string."""

    @property
    def index_file(self) -> str:
        return f"{self.name}/{INDEX_FILE}"

    @property
    def passages_file(self) -> str:
        return f"{self.name}/{PASSAGES_FILE}"


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """How much of an exact search an approximate one finds."""

    search_parameters: str
    """In FAISS's notation, e.g. nprobe=16."""
    recall: dict[str, float]
    """By cut-off ("1", "10", ...): share of the exact top k that is in the approximate top k."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int
    generation: int
    """0 when built, one more with every update."""
    count: int
    """Rows, those of deleted passages included."""
    num_deleted: int
    dimension: int
    metric: str
    factory: str
    """FAISS index factory string that the index was built with. Passages added later are in Flat segments."""
    search_parameters: str
    """How the index is searched unless the caller says otherwise; empty for FAISS's own defaults."""
    encoder: EncoderSpec
    encoder_fingerprint: str
    corpus_sources: tuple[str, ...]
    corpus_checksum: str
    """SHA-256 over the passages in order that it was built from; see `corpus.CorpusReader`."""
    num_duplicates: int
    """Passages left out because an earlier source had them with the same id and content."""
    segments: tuple[Segment, ...]
    tombstones: str | None
    """File with the rows of deleted passages."""
    bm25: str | None
    """Directory of the word index."""
    recall: tuple[RecallPoint, ...]
    """Measured against exact search when an approximate index was built; empty for an exact one."""
    files: dict[str, FileRecord] = field(hash=False)
    """All files of the index, by their path within it."""

    @property
    def num_passages(self) -> int:
        """Passages that can be found."""
        return self.count - self.num_deleted

    @property
    def fingerprint(self) -> str:
        """Identity of everything on disk that search results depend on."""
        parts = [self.encoder_fingerprint, self.search_parameters]
        parts += [f"{name} {record.sha256}" for name, record in sorted(self.files.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_manifest(index_dir: str | Path) -> Manifest:
    """The manifest of a built index.

    Raises:
        RetrieverError: there is none, or it is damaged or of another version.
    """
    path = Path(index_dir) / MANIFEST_FILE
    try:
        fields = json_object(path.read_bytes())
        if fields["version"] != FORMAT_VERSION:
            raise RetrieverError(
                f"{path}: index format {fields['version']}, this program reads {FORMAT_VERSION}; {MEND}"
            )
        fields["encoder"] = EncoderSpec(**fields["encoder"])
        fields["corpus_sources"] = tuple(fields["corpus_sources"])
        fields["segments"] = tuple(Segment(**segment) for segment in fields["segments"])
        fields["recall"] = tuple(RecallPoint(**point) for point in fields["recall"])
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        return Manifest(**fields)
    except OSError as error:
        raise RetrieverError(
            f"{index_dir} is not a built index (no readable {MANIFEST_FILE}); build one (exsearch index build), or "
            "name another"
        ) from error
    except RetrieverError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetrieverError(f"{path}: damaged manifest ({error!r:.200}); {MEND}") from error


def write_segment(
    index_dir: Path, number: int, index: faiss.Index, factory: str, write_passages: Callable[[Path], None]
) -> Segment:
    """Write a segment, whole or not at all; what is there under its number is replaced.

    Args:
        write_passages: writes those of the index's rows to a file that `Corpus` opens.

    Raises:
        RetrieverError: the disk is full.
    """
    library: Any = faiss  # its annotations leave this class out
    segment = Segment(f"segments/{number:04d}", index.ntotal, factory)
    final = index_dir / segment.name
    work = final.with_name(f".{final.name}.tmp")
    for leftover in (work, final):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with telling_of_room(final):
            # Not by FAISS alone: it goes on if there is no room for the last of its buffers.
            with open(work / INDEX_FILE, "wb") as file:
                faiss.write_index(index, library.PyCallbackIOWriter(file.write, _BLOCK_BYTES))
            write_passages(work / PASSAGES_FILE)
            for path in (*work.iterdir(), work):
                fsync(path)
        os.replace(work, final)
        fsync(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return segment


def files_below(index_dir: Path, name: str) -> list[str]:
    """The files in a directory of the index, by their paths within the index."""
    return sorted(
        str(path.relative_to(index_dir)) for path in (index_dir / name).rglob("*") if path.is_file()
    )


def write_manifest(manifest: Manifest, index_dir: Path) -> None:
    """Make `manifest` the state of the index, all at once."""
    write_json(index_dir / MANIFEST_FILE, dataclasses.asdict(manifest))


@dataclass(frozen=True, slots=True)
class OpenIndex:
    """One state of an index, memory-mapped: pages are read on demand and shared between processes."""

    directory: Path
    manifest: Manifest
    segments: tuple[faiss.Index, ...]
    corpus: Corpus
    alive: Mask | None
    """[count], False for deleted rows; None if there are none."""


def open_index(index_dir: str | Path) -> OpenIndex:
    """Open the newest state of an index without loading it.

    Raises:
        RetrieverError: a file is missing, cut short, or does not fit the manifest.
    """
    directory = Path(index_dir)
    for attempt in range(_OPEN_ATTEMPTS):
        manifest = read_manifest(directory)
        try:
            return _open(directory, manifest)
        except RetrieverError:
            # An update may have replaced the manifest, and removed files of the old one, meanwhile.
            if attempt == _OPEN_ATTEMPTS - 1 or read_manifest(directory) == manifest:
                raise
    raise AssertionError("unreachable")


def _open(directory: Path, manifest: Manifest) -> OpenIndex:
    for name, record in manifest.files.items():
        check_size(directory / name, record, MEND)
    segments = []
    for segment in manifest.segments:
        path = directory / segment.index_file
        opened = read_segment(path)
        if (opened.ntotal, opened.d) != (segment.count, manifest.dimension):
            raise RetrieverError(
                f"{path}: {opened.ntotal} vectors of {opened.d} dimensions, but the manifest says {segment.count} "
                f"of {manifest.dimension}; {MEND}"
            )
        segments.append(opened)
    corpus = Corpus(*(directory / segment.passages_file for segment in manifest.segments))
    if len(corpus) != manifest.count or manifest.count != sum(s.count for s in manifest.segments):
        raise RetrieverError(
            f"{directory}: {len(corpus)} passages, but the manifest says {manifest.count}; {MEND}"
        )
    return OpenIndex(directory, manifest, tuple(segments), corpus, _alive(directory, manifest))


def read_segment(index_file: Path, mend: str = MEND) -> faiss.Index:
    """The vectors of a segment, memory-mapped.

    Args:
        mend: what to do where the file cannot be read.

    Raises:
        RetrieverError: FAISS cannot read the file.
    """
    try:
        # The older IO_FLAG_MMAP silently reads Flat and HNSW indexes into memory.
        return faiss.read_index(str(index_file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise RetrieverError(f"{index_file}: FAISS cannot read it ({error}); {mend}") from error


def _alive(directory: Path, manifest: Manifest) -> Mask | None:
    if manifest.tombstones is None:
        return None
    alive = np.ones(manifest.count, dtype=np.bool_)
    try:
        alive[np.load(directory / manifest.tombstones, allow_pickle=False)] = False
    except (ValueError, IndexError, EOFError) as error:
        raise RetrieverError(
            f"{directory / manifest.tombstones} is damaged ({error!s:.200}); {MEND}"
        ) from error
    return alive


def verify_checksums(index_dir: str | Path) -> None:
    """Read every byte of the index and compare it with the manifest.

    Raises:
        RetrieverError: a file was changed since it was written.
    """
    for name, record in read_manifest(index_dir).files.items():
        check_contents(Path(index_dir) / name, record, MEND)


def check_encoder(manifest: Manifest, encoder: TextEncoder, index_dir: str | Path) -> None:
    """Refuse an encoder whose vectors do not belong to those of the index.

    Raises:
        RetrieverError: names both encoders, what differs between them and how to mend it.
    """
    if encoder.fingerprint == manifest.encoder_fingerprint:
        return
    built, given = dataclasses.asdict(manifest.encoder), dataclasses.asdict(encoder.spec)
    differing = [f"{key} {built[key]!r} -> {given[key]!r}" for key in built if built[key] != given[key]]
    raise RetrieverError(
        f"{index_dir} was built with encoder {manifest.encoder.model!r} "
        f"({manifest.encoder_fingerprint[:12]}), but encoder {encoder.spec.model!r} "
        f"({encoder.fingerprint[:12]}) was given; they differ in "
        f"{', '.join(differing) or 'weights or vocabulary'}. Use the encoder of the index, or build another"
    )
