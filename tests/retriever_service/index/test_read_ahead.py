"""A cold index is in memory before it is searched, as far as it fits there."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retriever_service.building import build
from retriever_service.cli import app
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.index import read_ahead as module
from retriever_service.index.read_ahead import read_ahead, size_of
from retriever_service.index.store import read_manifest
from tests.retriever_service.page_cache import cool, resident
from tests.retriever_service.support import load_hash_encoder, write_jsonl

build_index = partial(build.build_index, load_encoder=load_hash_encoder, workers=1)
PASSAGES = "segments/0000/passages.arrow"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few megabytes, most of them passages."""
    folder = tmp_path_factory.mktemp("indexed")
    texts = [" ".join(f"word{number * 7 % 50 + n}" for n in range(800)) for number in range(600)]
    corpus = write_jsonl(folder / "c.jsonl", [{"id": f"p{n}", "text": text} for n, text in enumerate(texts)])
    build_index([corpus], folder / "index", EncoderSpec("hash"), bm25=True)
    return folder / "index"


def test_every_page_of_a_cold_index_is_read(index: Path) -> None:
    files = cool(index)
    assert files[0] == index / PASSAGES
    read_ahead(index)
    assert [path for path in files if resident(path) < 1] == []


def test_of_an_index_that_is_larger_than_the_memory_so_much_is_read_as_fits_and_passages_last(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(index)
    without_passages = size_of(manifest) - manifest.files[PASSAGES].bytes
    monkeypatch.setattr(module, "available_memory", lambda: without_passages + 100_000)
    cool(index)
    read_ahead(index)
    assert {name for name in manifest.files if resident(index / name) < 1} == {PASSAGES}
    assert 0 < resident(index / PASSAGES) < 0.5
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        f"{size_of(manifest):,} bytes and this machine has memory for {without_passages + 100_000:,}"
        in warning
    )
    assert "give it more memory, or build the index smaller" in warning


def test_a_long_read_says_how_far_it_is(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    read_ahead(index)
    total = f"{size_of(read_manifest(index)):,}"
    lines = [line for line in caplog.messages if line.startswith(f"reading {index} ahead: ")]
    assert len(lines) > 2
    assert f" of {total} bytes in " in lines[0]
    assert f"ahead: {total} bytes in " in lines[-1]


def test_a_file_that_an_update_took_away_meanwhile_is_left_out(index: Path) -> None:
    passages = index / PASSAGES
    passages.rename(passages.with_suffix(".away"))
    try:
        read_ahead(index)
    finally:
        passages.with_suffix(".away").rename(passages)


def test_a_server_gets_its_engine_once_the_index_is_in_memory(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it answers that it loads; see `lifecycle`."""
    found: list[float] = []

    def serve(settings: object, open_engine: object, **others: object) -> None:
        assert callable(open_engine)
        found.append(resident(index / PASSAGES))
        assert open_engine() == "engine"
        found.append(resident(index / PASSAGES))

    monkeypatch.setattr("retriever_service.service.server.serve", serve)
    monkeypatch.setattr(
        "retriever_service.service.engine_processes.engine_opener", lambda *_, **__: lambda: "engine"
    )
    cool(index)
    result = CliRunner().invoke(app, ["serve", "--index", str(index)])
    assert result.exit_code == 0, result.output
    assert found == [0.0, 1.0]
