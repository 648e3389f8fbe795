"""Damage, a wrong model and a full disk: the commands end with exit code 2 and a clear message, and harm nothing."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from retriever_service.building import build
from retriever_service.cli import app
from retriever_service.encoding import encode
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.search.engine import SearchEngine
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl

COUNT = 40


class OtherWeights(HashEncoder):
    """Of the same name, but another model."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        self.fingerprint = "another" + self.fingerprint[7:]


@pytest.fixture(autouse=True)
def hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands encode by hashing, in this process."""
    encode_corpus = partial(encode.encode_corpus, load_encoder=load_hash_encoder, shard_rows=16)
    monkeypatch.setattr(encode, "encode_corpus", encode_corpus)
    monkeypatch.setattr(
        build, "encode_corpus", lambda *args, **how: encode_corpus(*args, **without_loader(how))
    )
    monkeypatch.setattr(build, "build_index", partial(build.build_index, load_encoder=load_hash_encoder))
    monkeypatch.setattr(
        "retriever_service.encoding.encoder.Encoder.load", lambda spec, device="cpu": HashEncoder(spec)
    )


def without_loader(how: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in how.items() if name != "load_encoder"}


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "title": f"Title {i}", "text": f"number{i} of {i % 7}"} for i in range(start, stop)
    ]


COMMANDS = {
    "encode": ("encode", "--corpus", "c.jsonl", "--out", "vectors", "--workers", "1"),
    "build": ("build", "--vectors", "vectors", "--out", "index", "--bm25", "--factory", "IVF2,SQ8"),
    "build of a corpus": ("build", "--corpus", "c.jsonl", "--out", "index", "--bm25", "--workers", "1"),
    "add": ("add", "--index", "index", "--corpus", "more.jsonl"),
    "delete": ("delete", "--index", "index", "p1", "p3"),
    "search": ("search", "number3", "--index", "index"),
}


def run(command: str) -> Result:
    return CliRunner().invoke(app, COMMANDS[command])


def done(command: str) -> None:
    result = run(command)
    assert result.exit_code == 0, result.output


def cut_off(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends when everything is made, and nothing declared whole."""
    with monkeypatch.context() as patch:
        for module in ("building.workshop.write_manifest", "encoding.encode.finish_job"):
            patch.setattr(f"retriever_service.{module}", stop)
        assert run(command).exit_code == 130


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def contents(directory: Path) -> dict[str, bytes]:
    """All that is there; of unfinished files and locks, nothing."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("lock", "filler") and not path.name.endswith(".tmp")
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus, and more passages."""
    return corpora(tmp_path, monkeypatch)


def corpora(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(folder / "c.jsonl", rows(0, COUNT))
    write_jsonl(folder / "more.jsonl", rows(COUNT, COUNT + 3))
    monkeypatch.chdir(folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def refused(command: str, folder: Path, *told: str) -> None:
    before = contents(folder)
    result = run(command)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert all(words in result.stderr for words in told), result.stderr
    assert contents(folder) == before


# ---------------------------------------------------------------- damage

SEGMENT = ("segments/0000/index.faiss", "segments/0000/passages.arrow")
WORDS = ("bm25-0/data.csc.index.npy", "bm25-0/indices.csc.index.npy", "bm25-0/terms.arrow")
UNFINISHED = ".index.partial"
damaging = pytest.mark.parametrize("damage", [flip, cut])


@damaging
@pytest.mark.parametrize("name", ["shards/00001.npy", "passages.arrow"])
@pytest.mark.parametrize("is_complete", [True, False])
def test_encoding_does_not_go_on_from_damaged_files(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_complete: bool,
    damage: Callable[[Path], None],
) -> None:
    if is_complete:
        done("encode")
    else:
        cut_off("encode", monkeypatch)
    damage(folder / "vectors" / name)
    refused("encode", folder, name.rsplit("/")[-1], "encode again")


@damaging
@pytest.mark.parametrize("name", ["shards/00001.npy", "passages.arrow"])
def test_no_index_is_built_of_damaged_vectors(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    done("encode")
    damage(folder / "vectors" / name)
    refused("build", folder, name, "encode again")
    assert not (folder / "index").exists() and not (folder / UNFINISHED).exists()


@damaging
@pytest.mark.parametrize("name", [*(f"index/{file}" for file in (*SEGMENT, *WORDS)), "trained.faiss"])
def test_a_build_does_not_go_on_from_damaged_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None]
) -> None:
    done("encode")
    cut_off("build", monkeypatch)
    damage(folder / UNFINISHED / name)
    refused("build", folder, name, f"remove {UNFINISHED} and build again")
    shutil.rmtree(folder / UNFINISHED)
    done("build")


@damaging
@pytest.mark.parametrize("name", [*SEGMENT, *WORDS, "tombstones-1.npy"])
@pytest.mark.parametrize("command", ["build of a corpus", "add", "delete"])
def test_a_damaged_index_is_neither_taken_for_whole_nor_changed(
    folder: Path, command: str, name: str, damage: Callable[[Path], None]
) -> None:
    done("build of a corpus")
    if name.startswith("tombstones"):
        CliRunner().invoke(app, ["delete", "--index", "index", "p0"])
    damage(folder / "index" / name)
    refused(command, folder, name, "build the index again")


@damaging
def test_a_server_that_was_told_to_verify_does_not_start_on_a_damaged_index(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    done("build of a corpus")
    damage(folder / "index" / SEGMENT[0])
    result = CliRunner().invoke(app, ["serve", "--index", "index", "--port", "0", "--verify"])
    assert result.exit_code == 2
    assert "build the index again" in result.stderr


@pytest.mark.parametrize("name", SEGMENT)
def test_an_addition_over_http_copies_no_damage(folder: Path, name: str) -> None:
    """There the index is not read whole, but what goes into new files is."""
    done("build of a corpus")
    engine = SearchEngine.open("index", load_encoder=load_hash_encoder)
    flip(folder / "index" / name)
    before = contents(folder)
    more = [dataclasses.replace(engine._index.corpus[0], id=f"new{i}") for i in range(COUNT)]
    with pytest.raises(RetrieverError, match=f"{name} was changed"):
        engine.add(more)
    assert contents(folder) == before


@pytest.mark.parametrize("command", ["encode", "build of a corpus"])
def test_a_corpus_that_was_changed_is_not_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    cut_off(command, monkeypatch)
    corpus = folder / "c.jsonl"
    corpus.write_bytes(corpus.read_bytes().replace(b"number7 ", b"numbes7 "))
    refused(command, folder, "corpus (40 passages, checksum", "-> (40 passages, checksum")


@pytest.mark.parametrize("command", ["encode", "build of a corpus", "add"])
def test_a_corpus_that_was_cut_short_leaves_nothing(folder: Path, command: str) -> None:
    if command == "add":
        done("build of a corpus")
    name = "more.jsonl" if command == "add" else "c.jsonl"
    os.truncate(folder / name, (folder / name).stat().st_size - 9)
    refused(command, folder, f"{name}:", "not valid JSON")


# ---------------------------------------------------------------- a wrong model


@pytest.mark.parametrize("command", ["encode", "build of a corpus", "add", "search"])
def test_another_model_of_the_same_name_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    done("encode")
    done("build of a corpus")
    load = lambda spec, device="cpu": OtherWeights(spec)  # noqa: E731
    monkeypatch.setattr("retriever_service.encoding.encoder.Encoder.load", load)
    monkeypatch.setattr(encode, "encode_corpus", partial(encode.encode_corpus, load_encoder=load))
    monkeypatch.setattr(build, "build_index", partial(build.build_index, load_encoder=load))
    refused(command, folder, "another")


# ---------------------------------------------------------------- a full disk

Shrink = Callable[[int], AbstractContextManager[None]]
"""So many steps of room (of files, or in each of them) are left within the context."""
PREPARED = {"encode": (), "build": ("encode",), "build of a corpus": (), "add": (), "delete": ()}


@contextmanager
def small_files(steps: int) -> Iterator[None]:
    """No file may grow beyond so many times 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * steps, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def filled(disk: Path, steps: int) -> Iterator[None]:
    """So many pages of 4 KiB are free."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 4_096 * steps))
    try:
        yield
    finally:
        (disk / "filler").unlink()


def grows_until_it_fits(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, shrink: Shrink, room_told: tuple[str, ...]
) -> None:
    """Refused with no room, and with a little, until there is enough: then all is as if nothing had been."""
    undisturbed = folder.parent / f"{folder.name}-undisturbed"
    undisturbed.mkdir()
    shutil.copytree(folder, undisturbed, dirs_exist_ok=True)
    before = contents(folder / "index") if (folder / "index").exists() else {}
    refusals, steps = 0, 0
    while True:
        with monkeypatch.context() as patch, shrink(steps):
            # What looks at free space beforehand has no say here: the disk fills up while files are written.
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
            result = run(command)
        if result.exit_code == 0:
            break
        assert result.exit_code == 2, result.output
        assert any(words in result.stderr for words in room_told), result.stderr
        if before:
            assert contents(folder / "index") == before
            SearchEngine.open("index", load_encoder=load_hash_encoder).search(["number1"], 3)
        refusals += 1
        steps += 1 + steps // 4
    assert refusals >= 2
    monkeypatch.chdir(undisturbed)
    done(command)
    for name in ("vectors", "index"):
        assert contents(folder / name) == contents(undisturbed / name)


def prepare(command: str) -> None:
    for earlier in PREPARED[command]:
        done(earlier)
    if command in ("add", "delete"):
        done("build of a corpus")


@pytest.mark.parametrize("command", PREPARED)
def test_full_disk(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    corpora(small_disk, monkeypatch)
    prepare(command)
    grows_until_it_fits(command, small_disk, monkeypatch, partial(filled, small_disk), ("ake room",))


@pytest.mark.parametrize("command", PREPARED)
def test_files_that_may_not_grow(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    prepare(command)
    grows_until_it_fits(command, folder, monkeypatch, small_files, ("ake room", "ulimit -f"))
