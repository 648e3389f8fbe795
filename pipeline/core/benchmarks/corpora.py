"""The corpora of a benchmark on disk: each read once, its words indexed once, its passages encoded once per encoder.

    OUT/corpora/NAME-DIGEST/passages.arrow      all passages
    OUT/corpora/NAME-DIGEST/bm25/               word index
    OUT/indexes/NAME-DIGEST-ENCODER/            vectors

DIGEST is of the contents: a corpus that changed is another one, and nothing of the old one is searched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from retriever_service.building.build import build_index
from retriever_service.encoding.encode_job import Progress
from retriever_service.encoding.encoder import BUNDLED_MODEL, EncoderSpec, LoadEncoder, TextEncoder
from retriever_service.index.bm25 import build_bm25
from retriever_service.index.store import MANIFEST_FILE
from retriever_service.passages.corpus import Corpus, CorpusReader, Passage, write_passages


def digest_of(*paths: Path) -> str:
    """SHA-256 over the contents of files, in their order; of a folder over all files below it, by their names."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def model_identity(name: str) -> str:
    """What stands for a model: of a folder the digest of its files, else its name."""
    path = Path(name)
    return digest_of(path) if name != BUNDLED_MODEL and path.is_dir() else name


def digest_json(value: object) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class BenchmarkCorpus:
    """One corpus, as files below a folder; see the module."""

    name: str
    digest: str
    sources: tuple[str, ...]
    """Files of passages."""
    folder: Path
    """OUT."""

    @classmethod
    def of_files(cls, name: str, paths: Sequence[Path], folder: Path) -> BenchmarkCorpus:
        """
        Raises:
            RetrieverError: one of the files is not there.
        """
        return cls(name, digest_of(*paths), tuple(map(str, paths)), folder)

    @classmethod
    def of_passages(cls, name: str, passages: Iterable[Passage], folder: Path) -> BenchmarkCorpus:
        """Generated ones; they are written as a file beside the others."""
        rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
        path = folder / "corpora" / f"{name}-{digest_json(rows)[:12]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(partial, path)
        return cls.of_files(name, [path], folder)

    @property
    def _directory(self) -> Path:
        return self.folder / "corpora" / f"{self.name}-{self.digest[:12]}"

    def passages(self) -> Corpus:
        """All passages by row, in the order of the sources; read at the first call.

        Raises:
            RetrieverError: a mistake in the sources.
        """
        path = self._directory / "passages.arrow"
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            write_passages(CorpusReader(self.sources), partial)
            os.replace(partial, path)
        return Corpus(path)

    def words(self) -> Path:
        """The word index, built at the first call."""
        directory = self._directory / "bm25"
        if not directory.exists():
            build_bm25(self.passages(), directory)
        return directory

    def vectors(
        self, spec: EncoderSpec, load: LoadEncoder, device: str, on_progress: Progress | None = None
    ) -> Path:
        """The index of an encoder's vectors, exact; built at the first call. Its rows are those of `passages`."""
        encoder = asdict(spec) | {"model": model_identity(spec.model), "device": device}
        out = self.folder / "indexes" / f"{self.name}-{self.digest[:12]}-{digest_json(encoder)[:12]}"
        if not (out / MANIFEST_FILE).exists():
            build_index(
                self.sources, out, spec, device=device, workers=1, load_encoder=load, on_progress=on_progress
            )
        return out


class Encoders:
    """The encoders of one process: each is loaded once, however many corpora it encodes."""

    def __init__(self, load: LoadEncoder) -> None:
        self._load = load
        self._loaded: tuple[EncoderSpec, str, TextEncoder] | None = None

    def __call__(self, spec: EncoderSpec, device: str) -> TextEncoder:
        if self._loaded is None or self._loaded[:2] != (spec, device):
            self._loaded = (spec, device, self._load(spec, device))
        return self._loaded[2]
