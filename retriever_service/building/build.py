"""Building an index: encoding its corpus, training, filling segments, publishing.

Guarantees:
- a directory with a manifest is a complete index: it is built in `.NAME.partial` beside it, then renamed;
- a build that was killed, at any moment, goes on by the same command, and ends with the same bytes as one that was
  not (HNSW graphs apart: FAISS links them in parallel);
- the whole corpus is read and checked, and the sizes are compared with what the machine has, before anything
  expensive;
- an existing index is never overwritten: the same corpus, encoder and factory reuse it, others are refused;
- what earlier runs left, vectors and parts of the index, is compared with its checksums before it is used;
- memory stays within the bound, whatever the corpus: vectors are read from files by slices, and the index is
  written by segments that fit.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retriever_service.building.planner import check_fits, plan_index
from retriever_service.building.tuning import Tunable, draw_sample, tune
from retriever_service.encoding.encode import Progress, encode_corpus
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder, Vectors
from retriever_service.encoding.vectors import VectorStore, read_record
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    FileRecord,
    check_contents,
    exclusive,
    fsync,
    record_file,
    telling_of_full_disk,
    write_json,
    writing,
)
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.dense import VectorSearch
from retriever_service.index.filling import fill
from retriever_service.index.index_size import empty_index, index_size
from retriever_service.index.store import (
    FLAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    METRIC,
    Manifest,
    RecallPoint,
    Segment,
    files_below,
    open_index,
    read_segment,
    verify_checksums,
    write_manifest,
    write_segment,
)
from retriever_service.machine import release_freed_memory
from retriever_service.passages.corpus import CorpusReader
from retriever_service.passages.ranked import NO_ROW, Ranked, Rows

logger = logging.getLogger(__name__)

TARGET_RECALL = 0.95
_RECALL_AT = 10
_JOB_FILE, _TRAINED_FILE, _INDEX_DIR = "job.json", "trained.faiss", "index"


def build_index(
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    factory: str = FLAT,
    device: str = "cpu",
    workers: int | None = None,
    memory_bytes: int | None = None,
    bm25: bool = False,
    target_recall: float = TARGET_RECALL,
    on_progress: Progress | None = None,
    load_encoder: LoadEncoder = Encoder.load,
    seed: int = 0,
) -> Manifest:
    """Encode a corpus and build the index directory `out_dir`, or reuse it if it is there already.

    Args:
        corpus_sources: see `CorpusReader`.
        device, workers, on_progress, load_encoder: of encoding; see `encode_corpus`.
        factory, memory_bytes, bm25, target_recall, seed: see `build_from_vectors`.

    Disk: the index, the passages, and 4 bytes per dimension and passage while it is being built.

    Raises:
        RetrieverError: a mistake in the corpus, encoder or factory; another index, an unfinished build of another
            one, or other files, in the way; too little memory or disk space.
    """
    out = Path(out_dir)
    _check_target(out)
    if (out / MANIFEST_FILE).exists():
        return _reuse(out, corpus_sources, spec, factory, bm25, device, load_encoder)
    with _workshop(out) as work:
        store = encode_corpus(
            corpus_sources,
            work / "vectors",
            spec,
            device=device,
            workers=workers,
            memory_bytes=memory_bytes,
            on_progress=on_progress,
            load_encoder=partial(_load_for, factory, load_encoder),
        )
        # Encoding has compared its shards with their checksums already.
        return _build(store, work, out, factory, memory_bytes, bm25, target_recall, seed, verify=False)


def _load_for(factory: str, load_encoder: LoadEncoder, spec: EncoderSpec, device: str) -> TextEncoder:
    """An encoder whose vectors an index of this factory string can hold: known before anything is encoded."""
    encoder = load_encoder(spec, device)
    index_size(factory, encoder.dimension)
    return encoder


def build_from_vectors(
    store: VectorStore,
    out_dir: str | Path,
    *,
    factory: str = FLAT,
    memory_bytes: int | None = None,
    bm25: bool = False,
    target_recall: float = TARGET_RECALL,
    seed: int = 0,
) -> Manifest:
    """Build the index directory `out_dir` from encoded passages.

    Args:
        factory: FAISS index factory string. Indexes that need training are trained on a sample drawn with
            `seed`.
        memory_bytes: most resident memory of this process while it builds; None for what the machine has free.
            The smaller, the more segments.
        bm25: build a word index too, for the search methods `bm25` and `hybrid`. It is built in one piece: its memory
            grows with the corpus, and a bound below that is refused.
        target_recall: of an approximate index: the share of the exact top 10 that `nprobe` or `efSearch` is tuned
            to find. What was measured goes into the manifest.

    Raises:
        RetrieverError: see `build_index`.
    """
    out = Path(out_dir)
    _check_target(out)
    if (out / MANIFEST_FILE).exists():
        raise RetrieverError(f"{out} holds an index already; name another directory or remove it")
    with _workshop(out) as work:
        return _build(store, work, out, factory, memory_bytes, bm25, target_recall, seed, verify=True)


def _build(
    store: VectorStore,
    work: Path,
    out: Path,
    factory: str,
    memory_bytes: int | None,
    bm25: bool,
    target_recall: float,
    seed: int,
    *,
    verify: bool,
) -> Manifest:
    given = store.manifest
    plan = plan_index(
        given.count,
        given.dimension,
        factory,
        memory_bytes=memory_bytes,
        passage_bytes=given.passages.bytes / given.count,
        has_vectors=True,
        bm25=bm25,
    )
    check_fits(plan, out, memory_bytes)
    if verify:
        store.verify()
    directory = work / _INDEX_DIR
    directory.mkdir(exist_ok=True)
    _check_job(
        work / _JOB_FILE,
        {
            "vectors": given.fingerprint,
            "factory": factory,
            "segments": list(plan.segments),
            "bm25": bm25,
            "target_recall": target_recall,
            "seed": seed,
        },
    )
    empty = _trained(store, factory, plan.training_rows, work, seed)
    segments, files = _fill_segments(store, work, factory, empty, plan.segments)
    words = "bm25-0" if bm25 else None
    if words is not None:
        files |= _once(work, directory, words, lambda: build_bm25(store.corpus, directory / words))
    search_parameters, recall = _tune(store, directory, segments, target_recall, seed)
    manifest = Manifest(
        version=FORMAT_VERSION,
        generation=0,
        count=given.count,
        num_deleted=0,
        dimension=given.dimension,
        metric=METRIC,
        factory=factory,
        search_parameters=search_parameters,
        encoder=given.encoder,
        encoder_fingerprint=given.encoder_fingerprint,
        corpus_sources=given.corpus_sources,
        corpus_checksum=given.corpus_checksum,
        num_duplicates=given.num_duplicates,
        segments=segments,
        tombstones=None,
        bm25=words,
        recall=recall,
        files=files,
    )
    write_manifest(manifest, directory)
    if out.exists():
        out.rmdir()  # empty: `_check_target`
    os.replace(directory, out)
    fsync(out.parent)
    logger.info(f"built {out}: {manifest.count} passages, {factory}, encoder {manifest.encoder.model}")
    return manifest


def _once(work: Path, root: Path, name: str, make: Callable[[], object]) -> dict[str, FileRecord]:
    """Make a file or directory of `root`, or take up what a build that was cut off has made of it.

    Returns:
        Its files, by their paths within `root`.

    Raises:
        RetrieverError: it was changed since it was made.
    """
    mend = f"remove {work} and build again"
    record = work / f"{name.replace('/', '-')}.json"
    path = root / name
    if not record.exists():
        if path.is_dir():
            shutil.rmtree(path)
        make()
        names = files_below(root, name) if path.is_dir() else [name]
        made = {file: record_file(root / file) for file in names}
        write_json(record, {file: dataclasses.asdict(it) for file, it in made.items()})
        return made
    left = read_record(record, dict[str, FileRecord], mend)
    for file, it in left.items():
        check_contents(root / file, it, mend)
    return left


def _trained(store: VectorStore, factory: str, num_rows: int, work: Path, seed: int) -> faiss.Index:
    """An empty index, trained on `num_rows` where its kind needs that; kept for whoever goes on."""
    index: faiss.Index = empty_index(factory, store.manifest.dimension)
    if index.is_trained:
        return index

    def train() -> None:
        count = store.manifest.count
        rows = np.random.default_rng(seed).choice(count, num_rows, replace=False, shuffle=False)
        try:
            index.train(store.sample(np.sort(rows)))
        except RuntimeError as error:
            raise RetrieverError(f"the index cannot be trained on {len(rows)} passages: {error}") from error
        with writing(work / _TRAINED_FILE) as file:
            file.write(faiss.serialize_index(index).tobytes())

    _once(work, work, _TRAINED_FILE, train)
    # Also where it was just trained: the index that goes on is then the same one with and without a kill.
    return faiss.read_index(str(work / _TRAINED_FILE))


def _fill_segments(
    store: VectorStore, work: Path, factory: str, empty: faiss.Index, counts: Sequence[int]
) -> tuple[tuple[Segment, ...], dict[str, FileRecord]]:
    """The segments and their files."""
    directory = work / _INDEX_DIR
    segments: list[Segment] = []
    files: dict[str, FileRecord] = {}
    start = 0
    for number, count in enumerate(counts):

        def fill_segment(number: int = number, count: int = count, start: int = start) -> None:
            index = faiss.clone_index(empty)
            fill(index, partial(_read_behind, store, start), count)
            write_segment(
                directory, number, index, factory, partial(store.corpus.write_rows, start, start + count)
            )
            del index
            release_freed_memory()
            logger.info(f"segment {number + 1} of {len(counts)}: {count} passages")

        segment = Segment(f"segments/{number:04d}", count, factory)
        files |= _once(work, directory, segment.name, fill_segment)
        segments.append(segment)
        start += count
    return tuple(segments), files


def _read_behind(store: VectorStore, offset: int, start: int, stop: int) -> Vectors:
    return store.read(offset + start, offset + stop)


def _tune(
    store: VectorStore, directory: Path, segments: Sequence[Segment], target_recall: float, seed: int
) -> tuple[str, tuple[RecallPoint, ...]]:
    """How an approximate index is best searched, and what was measured; nothing of an exact one."""
    k = min(_RECALL_AT, store.manifest.count - 1)
    if segments[0].factory == FLAT or k < 1:
        return "", ()

    def search(queries: Vectors, depth: int, search_parameters: str) -> Rows:
        scores, rows, start = [], [], 0
        for segment in segments:
            # One at a time: what is mapped, and was read, counts as memory of this process.
            vectors = VectorSearch([read_segment(directory / segment.index_file)])
            vectors.set_parameters(search_parameters)
            part = vectors.search(queries, depth)
            scores.append(part.scores)
            rows.append(np.where(part.rows >= 0, part.rows + start, NO_ROW))
            start += segment.count
        return Ranked.best(np.concatenate(scores, axis=1), np.concatenate(rows, axis=1), depth).rows

    sample = draw_sample(store, k, seed=seed)
    release_freed_memory()
    tunable = Tunable.of(read_segment(directory / segments[0].index_file))
    report = tune(store, sample, search, tunable, target_recall)
    return report.search_parameters, report.points


def _check_target(out: Path) -> None:
    if out.exists() and not (out / MANIFEST_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RetrieverError(f"{out} exists and is not an index; name another directory or remove it")


def _reuse(
    out: Path,
    corpus_sources: Sequence[str | Path],
    spec: EncoderSpec,
    factory: str,
    bm25: bool,
    device: str,
    load_encoder: LoadEncoder,
) -> Manifest:
    """The manifest of the existing index if it is the one asked for."""
    manifest = open_index(out).manifest
    verify_checksums(out)
    reader = CorpusReader(corpus_sources)
    for _ in reader:
        pass
    encoder = load_encoder(spec, device)
    asked = (reader.checksum, encoder.fingerprint, factory, bm25, 0)
    found = (
        manifest.corpus_checksum,
        manifest.encoder_fingerprint,
        manifest.factory,
        manifest.bm25 is not None,
        manifest.generation,
    )
    if asked != found:
        words = {True: " with words", False: ""}
        raise RetrieverError(
            f"{out} holds another index: {manifest.num_passages} passages of {', '.join(manifest.corpus_sources)} "
            f"(checksum {manifest.corpus_checksum[:12]}, {manifest.generation} updates), encoder "
            f"{manifest.encoder.model!r}, {manifest.factory}{words[manifest.bm25 is not None]}; asked for "
            f"{reader.num_passages} passages (checksum {reader.checksum[:12]}), encoder {encoder.spec.model!r}, "
            f"{factory}{words[bm25]}. Name another directory or remove it"
        )
    logger.info(f"{out}: the same index is there already ({manifest.count} passages); reused")
    return manifest


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """The directory beside `out` where it is built; stays if the build is cut off, for the next one to go on."""
    work = out.parent / f".{out.name}.partial"
    with telling_of_full_disk(out):
        work.mkdir(parents=True, exist_ok=True)
        with exclusive(work / "lock"):
            try:
                yield work
            except BaseException:
                if {path.name for path in work.iterdir()} == {"lock"}:  # nothing to go on with
                    shutil.rmtree(work)
                raise
            shutil.rmtree(work)


def _check_job(file: Path, job: dict[str, Any]) -> None:
    """Refuse to go on with a build of something else."""
    if not file.exists():
        write_json(file, job)
        return
    begun = read_record(file, dict[str, Any], f"remove {file.parent} and build again")
    if differing := [
        f"{key} {begun.get(key)!r} -> {value!r}" for key, value in job.items() if begun.get(key) != value
    ]:
        raise RetrieverError(
            f"{file.parent} holds an unfinished build of another index ({', '.join(differing)}). Finish that one with "
            "its own command, or remove the directory"
        )
