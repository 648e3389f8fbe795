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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

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
from retriever_service.encoding.encoder import Encoder, EncoderSpec, LoadEncoder, TextEncoder, Vectors
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

SAMPLE = 256
"""Passages that are encoded to be compared."""
LEAST_COSINE = 0.985
"""Median over the sample. Another number format, or 8 bits a dimension, leaves 0.999; another pooling does not."""
LEAST_NEAREST = 0.9
"""Share of the sample whose own vector is the nearest among the stored ones of the sample."""
_NORM = 0.05
_PYSERINI_INDEX, _PYSERINI_IDS = "index", "docid"

_FORMS: Mapping[str, str] = {
    "title and text": "{title} {text}",
    "title in quotes, text on the next line": '"{title}"\n{text}',
    "title, text on the next line": "{title}\n{text}",
    "text alone": "{text}",
}
"""How other programs put a passage before the encoder: ours, Search-R1's, Pyserini's."""


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
            check_belongs(opened, file, corpus, encoder, seed)
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


def check_belongs(opened: Any, file: Path, corpus: Corpus, encoder: TextEncoder, seed: int) -> None:
    """Compare vectors of the index with those that the encoder gives the passages of their rows.

    Raises:
        RetrieverError: they are not the same; says what differs, and by how much.
    """
    count = len(corpus)
    rows = np.sort(
        np.random.default_rng(seed).choice(count, min(SAMPLE, count), replace=False, shuffle=False)
    )
    stored = _stored(opened, file, rows)
    passages = [corpus[int(row)] for row in rows]
    compared = {name: _compared(encoder, _in_form(passages, form), stored) for name, form in _FORMS.items()}
    name, best = max(compared.items(), key=lambda item: item[1].cosine)
    if best.nearest < LEAST_NEAREST:
        raise RetrieverError(
            f"{file} is not of this corpus, in this order, or not of encoder {encoder.spec.model!r}: of {len(rows)} "
            f"passages that were encoded, {best.nearest:.0%} are nearest to the vector of their own row (median cosine "
            f"{best.cosine:.3f}). Name the corpus and the encoder that made it, or with --ids the order of its rows"
        )
    is_alike = best.cosine >= LEAST_COSINE and abs(best.norm - 1) <= _NORM
    if _keeps_vectors(opened) and not is_alike:
        raise RetrieverError(
            f"{file} is of this corpus, but its vectors are not those of encoder {encoder.spec.model!r} as it is used "
            f"here (passage prefix {encoder.spec.passage_prefix!r}, pooling {encoder.pooling or 'none'}): the median "
            f"cosine of {len(rows)} passages is {best.cosine:.3f}, {LEAST_COSINE} is wanted, and their lengths "
            f"differ by the factor {best.norm:.2f}. Give the prefixes and the model that it was made with"
        )
    if name != next(iter(_FORMS)):
        logger.warning(
            f"the passages of {file} were encoded as {name}; passages that are added later are encoded as "
            f"{next(iter(_FORMS))}"
        )


@dataclass(frozen=True, slots=True)
class _Likeness:
    """Of encoded passages to stored vectors."""

    cosine: float
    """Median."""
    nearest: float
    """Share whose own stored vector is the nearest of all stored ones."""
    norm: float
    """Median length of the stored ones, divided by that of the encoded ones."""


def _compared(encoder: TextEncoder, passages: Sequence[Passage], stored: Vectors) -> _Likeness:
    encoded = np.concatenate(list(encoder.encode_passages(passages)))
    lengths, own_lengths = np.linalg.norm(encoded, axis=1), np.linalg.norm(stored, axis=1)
    cosines = (encoded / lengths[:, None]) @ (stored / own_lengths[:, None]).T
    own = np.diag(cosines)
    return _Likeness(
        cosine=float(np.median(own)),
        # Copies of a text are as near as the text itself.
        nearest=float(np.mean(own >= cosines.max(axis=1) - 1e-4)),
        norm=float(np.median(own_lengths / lengths)),
    )


def _in_form(passages: Sequence[Passage], form: str) -> list[Passage]:
    return [
        replace(passage, title="", text=form.format(title=passage.title, text=passage.text))
        if passage.title
        else passage
        for passage in passages
    ]


def _stored(opened: Any, file: Path, rows: npt.NDArray[np.int64]) -> Vectors:
    try:
        if (inverted := faiss.try_extract_index_ivf(opened)) is not None:
            inverted.make_direct_map()
        return np.stack([opened.reconstruct(int(row)) for row in rows])
    except RuntimeError as error:
        raise RetrieverError(
            f"{file}: its vectors cannot be told row by row, so that nothing says whether they belong to this corpus "
            f"({str(error).splitlines()[-1]:.200}); rows must be numbered from 0"
        ) from error


def _keeps_vectors(opened: Any) -> bool:
    """Whether its vectors are kept so exactly that a cosine tells encoders apart: not in product quantisers."""
    kind: Any = faiss.downcast_index(opened)
    if isinstance(kind, faiss.IndexPreTransform):
        return _keeps_vectors(kind.index)
    if isinstance(kind, faiss.IndexHNSW):
        return _keeps_vectors(kind.storage)
    if isinstance(kind, faiss.IndexFlat | faiss.IndexIVFFlat):
        return True
    if isinstance(kind, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer):
        return bool(8 * kind.sq.code_size >= 8 * kind.d)
    return False


def _factory_of(opened: Any) -> str:
    """FAISS's name of its kind: from an index no factory string can be read."""
    kind = faiss.downcast_index(opened)
    return FLAT if isinstance(kind, faiss.IndexFlat) else type(kind).__name__


def _in_order(corpus: Corpus, ids: Path) -> Iterator[Passage]:
    """The passages of these ids.

    Raises:
        RetrieverError: while iterating; an id that the corpus does not have.
    """
    rows = {id_: row for row, id_ in enumerate(corpus.column("id").to_pylist())}
    for number, line in read_lines(ids):
        if (row := rows.get(line.strip())) is None:
            raise RetrieverError(f"{ids}:{number}: the corpus has no passage {line.strip()!r:.100}")
        yield corpus[row]


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
