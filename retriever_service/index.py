"""Building, opening and checking an index directory.

    INDEX/
      index.faiss       the vectors, in the row order of the passages
      passages.arrow    id, title, text by row (see `corpus.Corpus`)
      manifest.json     what it was built from and with, and the size and SHA-256 of the other two

Guarantees:
- a directory with a manifest is a complete index: it is built under a temporary name beside it, then renamed;
- the whole corpus is read and checked before the encoder is loaded and anything is computed;
- an existing index is never overwritten: the same corpus, encoder and factory reuse it, others are refused;
- an index is opened only with the encoder that it was built with, and only if its files have their recorded
  sizes.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retriever_service.corpus import Corpus, CorpusReader, write_passages
from retriever_service.encoder import Encoder, EncoderSpec, TextEncoder, Vectors
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
INDEX_FILE, PASSAGES_FILE, MANIFEST_FILE = "index.faiss", "passages.arrow", "manifest.json"
METRIC = "inner_product"
_SLICE_ROWS = 65_536
_TRAINING_ROWS_PER_CENTROID = 64

LoadEncoder = Callable[[EncoderSpec, str], TextEncoder]
"""(spec, device) -> encoder."""
Progress = Callable[[int, int], None]
"""(passages encoded, passages in all)."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file of the index."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int
    count: int
    """Passages."""
    dimension: int
    metric: str
    factory: str
    """FAISS index factory string."""
    encoder: EncoderSpec
    encoder_fingerprint: str
    corpus_sources: tuple[str, ...]
    corpus_checksum: str
    """SHA-256 over the passages in order; see `corpus.CorpusReader`."""
    num_duplicates: int
    """Passages left out because an earlier source had them with the same id and content."""
    files: dict[str, FileRecord]

    @property
    def fingerprint(self) -> str:
        """Identity of everything that search results depend on."""
        parts = (self.corpus_checksum, self.encoder_fingerprint, self.factory, self.files[INDEX_FILE].sha256)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def build_index(
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    factory: str = "Flat",
    device: str = "cpu",
    on_progress: Progress | None = None,
    load_encoder: LoadEncoder = Encoder.load,
    seed: int = 0,
) -> Manifest:
    """Build the index directory `out_dir`, or reuse it if it is there already.

    Args:
        corpus_sources: see `CorpusReader`.
        factory: FAISS index factory string. Indexes that need training are trained on a sample drawn with
            `seed`.
        device: where passages are encoded (torch device name).
        on_progress: called after every slice of passages.
        load_encoder: how a spec becomes an encoder.

    Memory: the index itself; the vectors pass through a file. Disk: the index plus 4 bytes per dimension and
    passage.

    Raises:
        RetrieverError: a mistake in the corpus, encoder or factory; another index, or other files, in
            `out_dir`; not enough disk space for the vectors.
    """
    out = Path(out_dir)
    if out.exists() and not (out / MANIFEST_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RetrieverError(f"{out} exists and is not an index; name another directory or remove it")
    with _temporary_sibling(out) as work:
        reader = CorpusReader(corpus_sources)
        write_passages(reader, work / PASSAGES_FILE)
        encoder = load_encoder(spec, device)
        if (out / MANIFEST_FILE).exists():
            return _reuse(out, reader, encoder, factory)
        corpus = Corpus(work / PASSAGES_FILE)
        index = _empty_index(factory, encoder.dimension, len(corpus))
        _check_disk(work, len(corpus) * encoder.dimension * 4 * 2)
        vectors_file = work / "vectors.f32"
        vectors = np.memmap(vectors_file, np.float32, "w+", shape=(len(corpus), encoder.dimension))
        _encode_into(vectors, corpus, encoder, on_progress)
        _fill(index, vectors, seed)
        faiss.write_index(index, str(work / INDEX_FILE))
        vectors_file.unlink()
        manifest = Manifest(
            version=FORMAT_VERSION,
            count=len(corpus),
            dimension=encoder.dimension,
            metric=METRIC,
            factory=factory,
            encoder=encoder.spec,
            encoder_fingerprint=encoder.fingerprint,
            corpus_sources=reader.sources,
            corpus_checksum=reader.checksum,
            num_duplicates=reader.num_duplicates,
            files={name: _record_file(work / name) for name in (INDEX_FILE, PASSAGES_FILE)},
        )
        (work / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        _publish(work, out)
    logger.info(f"built {out}: {manifest.count} passages, {factory}, encoder {manifest.encoder.model}")
    return manifest


def read_manifest(index_dir: str | Path) -> Manifest:
    """The manifest of a built index.

    Raises:
        RetrieverError: there is none, or it is damaged or of another version.
    """
    path = Path(index_dir) / MANIFEST_FILE
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields["version"] != FORMAT_VERSION:
            raise RetrieverError(
                f"{path}: index format {fields['version']}, this program reads {FORMAT_VERSION}"
            )
        fields["encoder"] = EncoderSpec(**fields["encoder"])
        fields["corpus_sources"] = tuple(fields["corpus_sources"])
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        return Manifest(**fields)
    except OSError as error:
        raise RetrieverError(
            f"{index_dir} is not a built index (no readable {MANIFEST_FILE}); build one, or name another"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RetrieverError(f"{path}: damaged manifest ({error!r}); build the index again") from error


def open_index(index_dir: str | Path) -> tuple[Manifest, faiss.Index, Corpus]:
    """Open a built index without loading it: its pages are read on demand and shared between processes.

    Raises:
        RetrieverError: a file is missing, cut short, or does not fit the manifest.
    """
    directory = Path(index_dir)
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise RetrieverError(
                f"{directory / name} {found}, expected {record.bytes} bytes; build the index again"
            )
    try:
        # The older IO_FLAG_MMAP silently reads Flat and HNSW indexes into memory.
        index = faiss.read_index(str(directory / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise RetrieverError(
            f"{directory / INDEX_FILE}: FAISS cannot read it ({error}); build it again"
        ) from error
    corpus = Corpus(directory / PASSAGES_FILE)
    found_shape = (index.ntotal, len(corpus), index.d)
    if found_shape != (manifest.count, manifest.count, manifest.dimension):
        raise RetrieverError(
            f"{directory}: {index.ntotal} vectors of {index.d} dimensions and {len(corpus)} passages, but "
            f"the manifest says {manifest.count} of {manifest.dimension}; build the index again"
        )
    return manifest, index, corpus


def verify_checksums(index_dir: str | Path) -> None:
    """Read every byte of the index and compare it with the manifest.

    Raises:
        RetrieverError: a file was changed since it was built.
    """
    for name, record in read_manifest(index_dir).files.items():
        if _record_file(Path(index_dir) / name) != record:
            raise RetrieverError(
                f"{Path(index_dir) / name} was changed since it was built; build the index again"
            )


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


@contextmanager
def _temporary_sibling(out: Path) -> Iterator[Path]:
    """A directory beside `out` that is removed unless it was renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    if leftovers := sorted(str(path) for path in out.parent.glob(f"{prefix}*")):
        logger.warning(
            f"found {', '.join(leftovers)}: of a build that is running or was killed; remove it if killed"
        )
    work = out.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reuse(out: Path, reader: CorpusReader, encoder: TextEncoder, factory: str) -> Manifest:
    """The manifest of the existing index if it is the one asked for."""
    manifest, _, _ = open_index(out)
    asked = (reader.checksum, encoder.fingerprint, factory)
    if asked != (manifest.corpus_checksum, manifest.encoder_fingerprint, manifest.factory):
        raise RetrieverError(
            f"{out} holds another index: {manifest.count} passages of {', '.join(manifest.corpus_sources)} "
            f"(checksum {manifest.corpus_checksum[:12]}), encoder {manifest.encoder.model!r}, "
            f"{manifest.factory}; asked for {reader.num_passages} passages (checksum {reader.checksum[:12]}), encoder "
            f"{encoder.spec.model!r}, {factory}. Name another directory or remove it"
        )
    logger.info(f"{out}: the same index is there already ({manifest.count} passages); reused")
    return manifest


def _empty_index(factory: str, dimension: int, count: int) -> faiss.Index:
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RetrieverError(
            f"index factory {factory!r} does not fit {dimension} dimensions: {error}"
        ) from error
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.nlist > count:
        raise RetrieverError(
            f"index factory {factory!r} needs at least {ivf.nlist} passages, the corpus has {count}"
        )
    return index


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RetrieverError(
            f"{directory.parent}: about {needed:,} bytes are needed to build the index, {free:,} are free"
        )


def _encode_into(
    vectors: Vectors, corpus: Corpus, encoder: TextEncoder, on_progress: Progress | None
) -> None:
    done = 0
    for part in encoder.encode_passages(corpus):
        vectors[done : done + len(part)] = part
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(vectors))
    if done != len(vectors):
        raise RuntimeError(f"the encoder gave {done} vectors for {len(vectors)} passages")


def _fill(index: faiss.Index, vectors: Vectors, seed: int) -> None:
    """Train the index where its kind needs that, then add all vectors."""
    if not index.is_trained:
        ivf = faiss.try_extract_index_ivf(index)
        wanted = _TRAINING_ROWS_PER_CENTROID * max(1_024, ivf.nlist if ivf is not None else 0)
        rows = np.random.default_rng(seed).permutation(len(vectors))[:wanted]
        try:
            index.train(np.ascontiguousarray(vectors[np.sort(rows)]))
        except RuntimeError as error:
            raise RetrieverError(f"the index cannot be trained on {len(rows)} passages: {error}") from error
    for start in range(0, len(vectors), _SLICE_ROWS):
        index.add(np.ascontiguousarray(vectors[start : start + _SLICE_ROWS]))


def _record_file(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _publish(work: Path, out: Path) -> None:
    """Make the finished directory durable and give it its name."""
    for path in [*work.iterdir(), work]:
        _fsync(path)
    try:
        os.replace(work, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RetrieverError(f"{out} was made by another process meanwhile; run again to reuse it") from error
    _fsync(out.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
