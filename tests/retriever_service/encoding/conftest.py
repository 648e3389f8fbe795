"""A corpus, and what encoding makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.retriever_service.encoding.encoding_support import encode, files, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> dict[str, bytes]:
    """All files of a job that nothing happened to."""
    encode(corpus, corpus.parent / "undisturbed")
    return files(corpus.parent / "undisturbed")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "vectors"
