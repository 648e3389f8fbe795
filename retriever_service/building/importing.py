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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retriever_service.building.belonging import OWN_FORM, check_belongs
from retriever_service.building.tuning import Tunable
from retriever_service.building.workshop import (
    INDEX_DIR,
    JOB_FILE,
    check_job,
    check_target,
    once,
    publish,
    workshop,
)
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder
from retriever_service.errors import RetrieverError
from retriever_service.files import FileRecord, check_disk, fsync, telling_of_room
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.dense import VectorSearch
from retriever_service.index.store import (
    FLAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    METRIC,
    PASSAGES_FILE,
    Manifest,
    Segment,
    read_segment,
)
from retriever_service.passages.corpus import Corpus, CorpusReader, Passage, write_passages
from retriever_service.passages.records import read_lines

logger = logging.getLogger(__name__)

_PYSERINI_INDEX, _PYSERINI_IDS = "index", "docid"


def import_index(
    index: str | Path,
    corpus_sources: Sequence[str | Path],
    out_dir: str | Path,
    spec: EncoderSpec,
    *,
    ids: str | Path | None = None,
    search_parameters: str = "",
    bm25: bool = False,
    link: bool = False,
    device: str = "cpu",
    load_encoder: LoadEncoder = Encoder.load,
    seed: int = 0,
) -> Manifest:
    """Make the index directory `out_dir` of a file that FAISS wrote.

    Args:
        index: the file, or Pyserini's folder (`index`, and `docid` with the ids of the rows).
        corpus_sources: see `CorpusReader`; passages in the order of the rows, unless `ids` says which row is which.
        ids: a file with the id of each row's passage, a line each.
        search_parameters: how an approximate index is searched, in FAISS's notation.
        bm25: build a word index too.
        link: a hard link in place of a copy; the file must not be changed afterwards.
        seed: of the sample that is compared.

    Raises:
        RetrieverError: no such file, or one that FAISS cannot read or that is not searched as ours are; a corpus or an
            encoder that does not belong to it; another index in the way; too little disk.
    """
    file, ids = _files_of(Path(index), None if ids is None else Path(ids))
    out = Path(out_dir)
    check_target(out)
    if (out / MANIFEST_FILE).exists():
        raise RetrieverError(f"{out} holds an index already; name another directory or remove it")
    opened = read_segment(file)
    _check_kind(opened, file, search_parameters)
    encoder = load_encoder(spec, device)
    if encoder.dimension != opened.d:
        raise RetrieverError(
            f"{file} has vectors of {opened.d} dimensions, encoder {encoder.spec.model!r} gives {encoder.dimension}; "
            "name the encoder that made them"
        )
    with workshop(out) as work:
        made = _Import(work, file, ids, opened, list(map(str, corpus_sources)), link, bm25)
        made.check_job(encoder)
        with _leaving_nothing(work):
            corpus, files, about = made.passages()
            form = check_belongs(opened, file, corpus, encoder, seed)
            if form != OWN_FORM:
                logger.warning(
                    f"the passages of {file} were encoded as {form}; passages that are added later are encoded as "
                    f"{OWN_FORM}"
                )
        files |= made.vectors(corpus)
        manifest = _manifest(opened, made.segment, encoder, search_parameters, about, made.words, files)
        publish(manifest, work / INDEX_DIR, out)
    logger.info(f"imported {file} as {out}: {manifest.count} passages, {manifest.factory}")
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
    file: Path
    ids: Path | None
    opened: Any
    sources: Sequence[str]
    link: bool
    bm25: bool

    def check_job(self, encoder: TextEncoder) -> None:
        """Refuse to go on with an import of something else."""
        state = self.file.stat()
        job = {
            "index": [str(self.file.resolve()), state.st_size, state.st_mtime_ns],
            "corpus": list(self.sources),
            "ids": None if self.ids is None else str(self.ids.resolve()),
            "encoder": encoder.fingerprint,
            "bm25": self.bm25,
        }
        check_job(self.work / JOB_FILE, job)

    @property
    def segment(self) -> Segment:
        return Segment("segments/0000", self.opened.ntotal, _factory_of(self.opened))

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
        if self.ids is None:
            write_passages(iter(reader), path)
        else:
            everything = path.with_name(f".{PASSAGES_FILE}.all")
            write_passages(iter(reader), everything)
            write_passages(_in_order(Corpus(everything), self.ids), path)
            everything.unlink()
        if (count := len(Corpus(path))) != self.opened.ntotal:
            raise RetrieverError(
                f"{self.file} has {self.opened.ntotal:,} vectors, {', '.join(self.sources)} {count:,} passages; name "
                "the corpus that it was made of"
            )

    def _take_vectors(self, path: Path) -> None:
        if self.link:
            try:
                os.link(self.file, path)
            except OSError as error:
                raise RetrieverError(
                    f"{self.file} cannot be linked to {path.parent} ({error.strerror}); copy it: leave --link out"
                ) from error
            return
        check_disk(path.parent, self.file.stat().st_size, "a copy of the index")
        with telling_of_room(path):
            shutil.copyfile(self.file, path)
            fsync(path)


def _files_of(index: Path, ids: Path | None) -> tuple[Path, Path | None]:
    if index.is_dir():
        own_ids = index / _PYSERINI_IDS
        index, ids = index / _PYSERINI_INDEX, ids or (own_ids if own_ids.is_file() else None)
    if not index.is_file():
        raise RetrieverError(f"there is no index {index}; name a file that FAISS wrote, or Pyserini's folder")
    if ids is not None and not ids.is_file():
        raise RetrieverError(f"there is no file of ids {ids}")
    return index, ids


def _check_kind(opened: Any, file: Path, search_parameters: str) -> None:
    """Refuse what would be searched with another meaning than ours."""
    kind = faiss.downcast_index(opened)
    if opened.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrieverError(
            f"{file} is searched by a distance, not by inner product, which is what scores are here. Build an index of "
            "vectors of length 1 with faiss.METRIC_INNER_PRODUCT: it gives the same order"
        )
    if isinstance(kind, faiss.IndexIDMap):
        raise RetrieverError(
            f"{file} maps its rows to ids of its own (IndexIDMap); write what it holds (faiss.write_index(index.index, "
            "FILE)), and give the ids with --ids"
        )
    if not opened.ntotal:
        raise RetrieverError(f"{file} holds no vectors")
    tunable = Tunable.of(opened)
    if tunable is not None and not search_parameters:
        raise RetrieverError(
            f"{file} is approximate: say with --search-parameters how thoroughly it is searched, such as "
            f"{tunable.name}=64"
        )
    VectorSearch([opened]).set_parameters(search_parameters)


def _factory_of(opened: Any) -> str:
    """FAISS's name of its kind: from an index no factory string can be read."""
    kind = faiss.downcast_index(opened)
    return FLAT if isinstance(kind, faiss.IndexFlat) else type(kind).__name__


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


def _manifest(
    opened: Any,
    segment: Segment,
    encoder: TextEncoder,
    search_parameters: str,
    about: _About,
    words: str | None,
    files: Mapping[str, FileRecord],
) -> Manifest:
    return Manifest(
        version=FORMAT_VERSION,
        generation=0,
        count=segment.count,
        num_deleted=0,
        dimension=opened.d,
        metric=METRIC,
        factory=segment.factory,
        search_parameters=search_parameters,
        encoder=encoder.spec,
        encoder_fingerprint=encoder.fingerprint,
        corpus_sources=about.sources,
        corpus_checksum=about.checksum,
        num_duplicates=about.num_duplicates,
        segments=(segment,),
        tombstones=None,
        bm25=words,
        recall=(),
        files=dict(files),
    )
