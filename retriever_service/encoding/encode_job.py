"""The job of encoding a corpus: what is made, which shards are still to be made, making one, closing it.

    with open_job(...) as job:                      # reads and checks the corpus, asks for an encoder, refuses
        for number in pending_shards(job):          # in any order, by anybody who sees the directory
            encode_shard(job, number, encoder)
        store = finish_job(job)

Guarantees:
- the job goes on behind the last whole shards, whenever and however it was cut off;
- a directory that holds another job is refused and left alone; so is one with a damaged shard;
- one process at a time has a job open; a job that could not even begin leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retriever_service.choices import StoreDtype
from retriever_service.encoding.encoder import EncoderSpec, OnRows, TextEncoder
from retriever_service.encoding.vectors import (
    FORMAT_VERSION,
    JOB_FILE,
    MANIFEST_FILE,
    MEND,
    PASSAGES_FILE,
    SHARDS_DIR,
    Contents,
    Job,
    Shard,
    VectorStore,
    read_record,
)
from retriever_service.errors import RetrieverError
from retriever_service.files import (
    check_contents,
    check_disk,
    check_size,
    exclusive,
    record_file,
    telling_of_full_disk,
    write_array,
    write_json,
    writing,
)
from retriever_service.passages.corpus import Corpus, CorpusReader, write_passages

logger = logging.getLogger(__name__)

SHARD_ROWS = 4_096
_LOCK_FILE = "lock"
_MEND_JOB = "remove the directory and encode the corpus anew"

Progress = Callable[[int, int], None]
"""(passages encoded, passages in all)."""


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What a store records of its encoder; see `TextEncoder`."""

    spec: EncoderSpec
    dimension: int
    fingerprint: str
    pooling: str

    @classmethod
    def of(cls, encoder: TextEncoder) -> EncoderIdentity:
        return cls(encoder.spec, encoder.dimension, encoder.fingerprint, encoder.pooling)


@contextmanager
def open_job(
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    *,
    shard_rows: int,
    store_dtype: StoreDtype,
    identify: Callable[[int], EncoderIdentity],
) -> Iterator[Job]:
    """Begin a job, or take up the one that `out_dir` holds; nobody else can have it open at the same time.

    Args:
        identify: loads the encoder; called with the number of passages, once all were read and found good.

    Raises:
        RetrieverError: a mistake in the corpus; another job, or other files, in `out_dir`; a damaged shard; too little
            disk space.
    """
    if store_dtype not in ("float32", "float16") or shard_rows < 1:
        raise RetrieverError(
            f"vectors are stored as float32 or float16, in shards of at least 1 row; got {store_dtype!r}, {shard_rows}"
        )
    out = Path(out_dir).absolute()
    _refuse_other_files(out)
    with telling_of_full_disk(out):
        (out / SHARDS_DIR).mkdir(parents=True, exist_ok=True)
        with exclusive(out / _LOCK_FILE):
            try:
                job = _begin(out, corpus_sources, shard_rows, store_dtype, identify)
            except BaseException:
                if not (out / JOB_FILE).exists():
                    _discard(out)
                raise
            yield job


def _begin(
    out: Path,
    corpus_sources: Sequence[str | Path],
    shard_rows: int,
    store_dtype: StoreDtype,
    identify: Callable[[int], EncoderIdentity],
) -> Job:
    for leftover in (*out.glob(".*.tmp"), *(out / SHARDS_DIR).glob(".*.tmp")):
        leftover.unlink()  # of a process that was killed while it wrote
    begun = read_record(out / JOB_FILE, Contents, _MEND_JOB) if (out / JOB_FILE).exists() else None
    reader = _read_corpus(corpus_sources, out / PASSAGES_FILE, keep=begun is not None)
    encoder = identify(reader.num_passages)
    asked = Contents(
        version=FORMAT_VERSION,
        count=reader.num_passages,
        dimension=encoder.dimension,
        dtype=store_dtype,
        shard_rows=shard_rows,
        encoder=encoder.spec,
        encoder_fingerprint=encoder.fingerprint,
        pooling=encoder.pooling,
        corpus_sources=reader.sources,
        corpus_checksum=reader.checksum,
        num_duplicates=reader.num_duplicates,
        passages=record_file(out / PASSAGES_FILE),
    )
    if begun is None:
        job = Job(out, asked)
    else:
        _refuse_differences(out, begun, asked)
        job = Job(out, begun)
        if asked.passages != begun.passages:
            check_contents(out / PASSAGES_FILE, begun.passages, MEND)
        _check_finished(job)
    rows = sum(len(job.rows(number)) for number in pending_shards(job))
    check_disk(out, rows * job.contents.row_bytes, f"encoding {rows:,} passages")
    if begun is None:
        write_json(out / JOB_FILE, dataclasses.asdict(asked))
    return job


def _read_corpus(sources: Sequence[str | Path], passages: Path, *, keep: bool) -> CorpusReader:
    """Read and check everything; write `passages`, unless it is to be kept and there."""
    reader = CorpusReader(sources)
    if keep and passages.exists():
        for _ in reader:
            pass
        return reader
    check_disk(passages.parent, plain_bytes(reader.sources), "a copy of the passages")
    with writing(passages) as file:
        write_passages(reader, Path(file.name))
    return reader


def plain_bytes(sources: Sequence[str | Path]) -> int:
    """Of files as they are; what comes compressed or from the hub has no size to go by."""
    plain = [path for path in map(Path, sources) if path.is_file() and path.suffix != ".gz"]
    return sum(path.stat().st_size for path in plain)


def pending_shards(job: Job) -> list[int]:
    """The numbers of the shards that are not finished.

    Raises:
        RetrieverError: a shard is there but not as it was recorded.
    """
    return [number for number in range(job.num_shards) if _finished(job, number) is None]


def encode_shard(job: Job, number: int, encoder: TextEncoder, on_rows: OnRows | None = None) -> Shard:
    """Make one shard. Its vectors depend on its passages and the encoder only.

    Args:
        on_rows: called with every number of further passages that are encoded.

    Raises:
        RetrieverError: the encoder is not the job's, or the vectors do not fit the job's dtype; a full disk.
    """
    contents = job.contents
    if encoder.fingerprint != contents.encoder_fingerprint:
        raise RetrieverError(
            f"{job.directory} is encoded with {contents.encoder.model!r}, not {encoder.spec.model!r} as it is here "
            f"({contents.encoder_fingerprint[:12]}, not {encoder.fingerprint[:12]})"
        )
    rows = job.rows(number)
    # Opened anew for every shard: what was mapped for the one before is given back.
    corpus = Corpus(job.directory / PASSAGES_FILE)
    vectors = np.empty((len(rows), contents.dimension), dtype=contents.dtype)
    done = 0
    with np.errstate(over="ignore"):
        for part in encoder.encode_passages((corpus[row] for row in rows), on_rows):
            vectors[done : done + len(part)] = part
            done += len(part)
    if done != len(rows):
        raise RuntimeError(f"the encoder gave {done} vectors for {len(rows)} passages")
    if not np.isfinite(vectors).all():
        raise RetrieverError(f"vectors of {contents.encoder.model} do not fit {contents.dtype}; use float32")
    vectors_file, record = job.files(number)
    with writing(vectors_file) as file:
        write_array(file, vectors)
    shard = Shard(vectors_file.name, rows.start, len(rows), record_file(vectors_file))
    write_json(record, dataclasses.asdict(shard))
    return shard


def counter(job: Job, pending: Sequence[int], on_progress: Progress | None) -> Callable[[int], None]:
    """What to tell of every number of further passages, so that `on_progress` hears; it hears at once what is there."""
    done = job.contents.count - sum(len(job.rows(number)) for number in pending)

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if on_progress is not None:
            on_progress(done, job.contents.count)

    count(0)
    return count


def finish_job(job: Job) -> VectorStore:
    """Declare the store complete, once every shard is finished, and open it."""
    if not (job.directory / MANIFEST_FILE).exists():
        shards = [_finished(job, number) for number in range(job.num_shards)]
        if None in shards:
            raise RuntimeError(f"{job.directory}: shard {shards.index(None)} is not finished")
        manifest = dataclasses.asdict(job.contents) | {"shards": [dataclasses.asdict(s) for s in shards if s]}
        write_json(job.directory / MANIFEST_FILE, manifest)
        logger.info(f"encoded {job.contents.count} passages into {job.directory}")
    return VectorStore.open(job.directory)


def _finished(job: Job, number: int) -> Shard | None:
    """The record of a shard, None as long as there is none; a shard without a record is made again."""
    vectors, record = job.files(number)
    if not (vectors.exists() and record.exists()):
        return None
    shard = read_record(record, Shard, MEND)
    rows = job.rows(number)
    if (shard.name, shard.first_row, shard.rows) != (vectors.name, rows.start, len(rows)):
        raise RetrieverError(f"{record} is of another shard; {MEND}")
    check_size(vectors, shard.record, MEND)
    return shard


def _check_finished(job: Job) -> None:
    """Read what others, perhaps long ago, finished: a job must not end with a damaged shard in it."""
    for number in range(job.num_shards):
        if (shard := _finished(job, number)) is not None:
            check_contents(job.files(number)[0], shard.record, MEND)


def _refuse_other_files(out: Path) -> None:
    if not out.exists() or (out / JOB_FILE).exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    others = {name for name in names if not name.endswith(".tmp")} - {PASSAGES_FILE, SHARDS_DIR, _LOCK_FILE}
    if others or any((out / SHARDS_DIR).glob("*.npy")):
        raise RetrieverError(
            f"{out} exists and is not a directory of vectors; name another directory or remove it"
        )


def _refuse_differences(out: Path, begun: Contents, asked: Contents) -> None:
    """Refuse to go on with anything but the same job."""
    differing = [
        f"{name} {getattr(begun, name)} -> {getattr(asked, name)}"
        for name in ("dtype", "shard_rows")
        if getattr(begun, name) != getattr(asked, name)
    ]
    if begun.encoder_fingerprint != asked.encoder_fingerprint:
        old, new = dataclasses.asdict(begun.encoder), dataclasses.asdict(asked.encoder)
        uses = [f"encoder {key} {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
        differing = [*(uses or ["the encoder's weights or vocabulary"]), *differing]
    if begun.corpus_checksum != asked.corpus_checksum:
        before, now = (f"{c.count} passages, checksum {c.corpus_checksum[:12]}" for c in (begun, asked))
        differing = [f"corpus ({before}) -> ({now})", *differing]
    if differing:
        raise RetrieverError(
            f"{out} holds vectors of another job; it differs in {'; '.join(differing)}. Go on with the same corpus and "
            "encoder, or name another directory"
        )


def _discard(out: Path) -> None:
    """Remove what a job that could not begin has made."""
    for name in (PASSAGES_FILE, _LOCK_FILE):
        (out / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: somebody else's files
        (out / SHARDS_DIR).rmdir()
        out.rmdir()
