"""Taking over an index that FAISS wrote elsewhere, with its corpus and its encoder, without encoding the corpus again.

Guarantees:
- what is taken over answers as FAISS itself does: the file is not changed, and its rows are the passages;
- whether corpus, order and encoder belong to it is looked at before: passages spread over the corpus are encoded and
  compared with the vectors that are stored for them;
- whole or absent, as a build is (`building.workshop`); memory is that of a batch of passages and one number per row.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retriever_service.building.belonging import check_belongs, check_template
from retriever_service.building.ready_index import ReadyIndex
from retriever_service.building.tuning import TARGET_RECALL, Tunable, tune_segments
from retriever_service.building.workshop import (
    INDEX_DIR,
    JOB_FILE,
    check_job,
    check_target,
    once,
    publish,
    workshop,
)
from retriever_service.encoding.encode import Progress
from retriever_service.encoding.encode_job import plain_bytes
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder
from retriever_service.errors import RetrieverError
from retriever_service.files import FileRecord, check_disk, fsync, telling_of_room
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.dense import VectorSearch
from retriever_service.index.store import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    METRIC,
    PASSAGES_FILE,
    Manifest,
    RecallPoint,
    Segment,
)
from retriever_service.passages.corpus import Corpus, CorpusReader, Passage, write_passages
from retriever_service.passages.records import read_lines

logger = logging.getLogger(__name__)

_TOLD_EVERY = 10_000


def import_index(
    index: str | Path,
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    ids: str | Path | None = None,
    search_parameters: str = "",
    target_recall: float = TARGET_RECALL,
    bm25: bool = False,
    link: bool = False,
    device: str = "cpu",
    on_progress: Progress | None = None,
    load_encoder: LoadEncoder = Encoder.load,
    seed: int = 0,
) -> Manifest:
    """Make the index directory `out_dir` of a file that FAISS wrote.

    Args:
        index: the file, or Pyserini's folder (`index`, and `docid` with the ids of the rows).
        corpus_sources: see `CorpusReader`; passages in the order of the rows, unless `ids` says which row is which.
        spec: the encoder that made the vectors, as it was used. Where `passage_template` is open, the usual ones are
            tried, and the one that fits is kept.
        ids: a file with the id of each row's passage, a line each.
        search_parameters: how an approximate index is searched, in FAISS's notation; empty to tune it to
            `target_recall`, against an exact search over the vectors that it holds.
        bm25: build a word index too.
        link: a hard link in place of a copy; the file must not be changed afterwards.
        on_progress: told of passages that were read.
        seed: of the passages that are compared, and of those that it is tuned with.

    Raises:
        RetrieverError: no such file, or one that FAISS cannot read or that is not searched as ours are; a corpus or an
            encoder that does not belong to it; another index in the way; too little disk.
    """
    out = Path(out_dir)
    check_target(out)
    if (out / MANIFEST_FILE).exists():
        raise RetrieverError(f"{out} holds an index already; name another directory or remove it")
    if spec.passage_template is not None:
        check_template(spec.passage_template)
    ready = ReadyIndex.open(Path(index), None if ids is None else Path(ids))
    VectorSearch([ready.index]).set_parameters(search_parameters)
    encoder = load_encoder(spec, device)
    if encoder.dimension != ready.index.d:
        raise RetrieverError(
            f"{ready.file} has vectors of {ready.index.d} dimensions, encoder {encoder.spec.model!r} gives "
            f"{encoder.dimension}; name the encoder that made them"
        )
    with workshop(out) as work:
        made = _Import(work, ready, list(map(str, corpus_sources)), link, bm25, on_progress)
        made.check_job(encoder)
        with _leaving_nothing(work):
            corpus, files, about = made.passages()
            template = check_belongs(ready, corpus, encoder, spec.passage_template, seed)
        if template != encoder.spec.passage_template:
            encoder = load_encoder(replace(spec, passage_template=template), device)
        files |= made.vectors(corpus)
        recall: tuple[RecallPoint, ...] = ()
        if not search_parameters and Tunable.of(ready.index) is not None:
            logger.info(
                f"tuning {ready.factory} to recall {target_recall}; --search-parameters leaves this out"
            )
            search_parameters, recall = tune_segments(
                ready, work / INDEX_DIR, [made.segment], target_recall, seed
            )
        manifest = Manifest(
            version=FORMAT_VERSION,
            generation=0,
            count=made.segment.count,
            num_deleted=0,
            dimension=encoder.dimension,
            metric=METRIC,
            factory=made.segment.factory,
            search_parameters=search_parameters,
            encoder=encoder.spec,
            encoder_fingerprint=encoder.fingerprint,
            corpus_sources=about.sources,
            corpus_checksum=about.checksum,
            num_duplicates=about.num_duplicates,
            segments=(made.segment,),
            tombstones=None,
            bm25=made.words,
            recall=recall,
            files=files,
        )
        publish(manifest, work / INDEX_DIR, out)
    logger.info(f"imported {ready.file} as {out}: {manifest.count} passages, {manifest.factory}")
    return manifest


@contextmanager
def _leaving_nothing(work: Path) -> Iterator[None]:
    """What does not belong together is not gone on with."""
    try:
        yield
    except RetrieverError:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        raise


@dataclass(frozen=True, slots=True)
class _About:
    """What a manifest says of the corpus."""

    sources: tuple[str, ...]
    checksum: str
    num_duplicates: int


@dataclass(frozen=True, slots=True)
class _Import:
    """What goes into the directory, part by part; a part that an earlier process has made is taken up."""

    work: Path
    ready: ReadyIndex
    sources: Sequence[str]
    link: bool
    bm25: bool
    on_progress: Progress | None

    def check_job(self, encoder: TextEncoder) -> None:
        """Refuse to go on with an import of something else."""
        state = self.ready.file.stat()
        job = {
            "index": [str(self.ready.file.resolve()), state.st_size, state.st_mtime_ns],
            "corpus": list(self.sources),
            "ids": None if self.ready.ids is None else str(self.ready.ids.resolve()),
            "encoder": encoder.fingerprint,
            "bm25": self.bm25,
        }
        check_job(self.work / JOB_FILE, job)

    @property
    def segment(self) -> Segment:
        return Segment("segments/0000", self.ready.index.ntotal, self.ready.factory)

    @property
    def words(self) -> str | None:
        return "bm25-0" if self.bm25 else None

    def passages(self) -> tuple[Corpus, dict[str, FileRecord], _About]:
        """Those of the rows, in their order."""
        directory = self.work / INDEX_DIR
        path = directory / self.segment.passages_file
        path.parent.mkdir(parents=True, exist_ok=True)
        reader = CorpusReader(self.sources)
        files = once(
            self.work, directory, self.segment.passages_file, lambda: self._write_passages(reader, path)
        )
        if not reader.num_passages:  # an earlier process has written them
            for _ in reader:
                pass
        return Corpus(path), files, _About(reader.sources, reader.checksum, reader.num_duplicates)

    def vectors(self, corpus: Corpus) -> dict[str, FileRecord]:
        """The index itself, and the word index if there is to be one."""
        directory, words = self.work / INDEX_DIR, self.words
        path = directory / self.segment.index_file
        files = once(self.work, directory, self.segment.index_file, lambda: self._take_vectors(path))
        if words is not None:
            files |= once(self.work, directory, words, lambda: build_bm25(corpus, directory / words))
        return files

    def _write_passages(self, reader: CorpusReader, path: Path) -> None:
        copies = 1 if self.ready.ids is None else 2
        check_disk(path.parent, copies * plain_bytes(self.sources), "a copy of the passages")
        if self.ready.ids is None:
            write_passages(self._told(reader), path)
        else:
            everything = path.with_name(f".{PASSAGES_FILE}.all")
            write_passages(self._told(reader), everything)
            write_passages(_in_order(Corpus(everything), self.ready.ids), path)
            everything.unlink()
        count, expected = len(Corpus(path)), self.ready.index.ntotal
        if count != expected:
            again = f" (and {reader.num_duplicates:,} that came again)" if reader.num_duplicates else ""
            raise RetrieverError(
                f"{self.ready.file} has {expected:,} vectors, {', '.join(self.sources)} {count:,} passages{again}; "
                "name the corpus that it was made of"
            )

    def _told(self, passages: Iterable[Passage]) -> Iterator[Passage]:
        for number, passage in enumerate(passages, start=1):
            yield passage
            if self.on_progress is not None and number % _TOLD_EVERY == 0:
                self.on_progress(number, self.ready.index.ntotal)

    def _take_vectors(self, path: Path) -> None:
        if self.link:
            try:
                os.link(self.ready.file, path)
            except OSError as error:
                raise RetrieverError(
                    f"{self.ready.file} cannot be linked to {path.parent} ({error.strerror}); copy it: leave --link out"
                ) from error
            return
        check_disk(path.parent, self.ready.file.stat().st_size, "a copy of the index")
        with telling_of_room(path):
            shutil.copyfile(self.ready.file, path)
            fsync(path)


def _in_order(corpus: Corpus, ids: Path) -> Iterator[Passage]:
    """The passages of these ids, each of which comes once.

    Raises:
        RetrieverError: while iterating; an id that the corpus does not have, or that comes again.
    """
    # In Arrow's arrays: as objects of Python the ids of 21 million passages take gigabytes.
    wanted = pa.array((line.strip() for _, line in read_lines(ids)), pa.string())
    rows = pc.index_in(wanted, value_set=corpus.column("id").combine_chunks())
    if rows.null_count:
        place = pc.index(pc.is_null(rows), True).as_py()
        raise RetrieverError(
            f"{ids}: the corpus has no passage {wanted[place].as_py()!r:.100} (id {place + 1})"
        )
    seen = np.zeros(len(corpus), dtype=np.bool_)
    for place, row in enumerate(rows.to_numpy()):
        if seen[row]:
            raise RetrieverError(f"{ids}: {wanted[place].as_py()!r:.100} (id {place + 1}) comes again")
        seen[row] = True
        yield corpus[int(row)]
