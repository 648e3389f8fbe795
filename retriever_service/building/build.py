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

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from retriever_service.building.planner import check_fits, plan_index
from retriever_service.building.tuning import TARGET_RECALL, tune_segments
from retriever_service.building.workshop import (
    INDEX_DIR,
    JOB_FILE,
    check_job,
    check_target,
    once,
    publish,
    workshop,
)
from retriever_service.encoding.encode import Progress, encode_corpus
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder, Vectors
from retriever_service.encoding.vectors import VectorStore
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    FileRecord,
    writing,
)
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.filling import fill
from retriever_service.index.index_size import empty_index, index_size
from retriever_service.index.store import (
    FLAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    METRIC,
    Manifest,
    Segment,
    open_index,
    verify_checksums,
    write_segment,
)
from retriever_service.machine import release_freed_memory
from retriever_service.passages.corpus import CorpusReader

logger = logging.getLogger(__name__)

_TRAINED_FILE = "trained.faiss"


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
    check_target(out)
    if (out / MANIFEST_FILE).exists():
        return _reuse(out, corpus_sources, spec, factory, bm25, device, load_encoder)
    with workshop(out) as work:
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
    check_target(out)
    if (out / MANIFEST_FILE).exists():
        raise RetrieverError(f"{out} holds an index already; name another directory or remove it")
    with workshop(out) as work:
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
    directory = work / INDEX_DIR
    directory.mkdir(exist_ok=True)
    check_job(
        work / JOB_FILE,
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
        files |= once(work, directory, words, lambda: build_bm25(store.corpus, directory / words))
    search_parameters, recall = tune_segments(store, directory, segments, target_recall, seed)
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
    publish(manifest, directory, out)
    logger.info(f"built {out}: {manifest.count} passages, {factory}, encoder {manifest.encoder.model}")
    return manifest


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

    once(work, work, _TRAINED_FILE, train)
    # Also where it was just trained: the index that goes on is then the same one with and without a kill.
    return faiss.read_index(str(work / _TRAINED_FILE))


def _fill_segments(
    store: VectorStore, work: Path, factory: str, empty: faiss.Index, counts: Sequence[int]
) -> tuple[tuple[Segment, ...], dict[str, FileRecord]]:
    """The segments and their files."""
    directory = work / INDEX_DIR
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
        files |= once(work, directory, segment.name, fill_segment)
        segments.append(segment)
        start += count
    return tuple(segments), files


def _read_behind(store: VectorStore, offset: int, start: int, stop: int) -> Vectors:
    return store.read(offset + start, offset + stop)


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
