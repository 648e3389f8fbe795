"""A disk without room for one more file or folder, wherever that comes: one clear error, and the same call goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retriever_service.building.build import build_index
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.store import verify_checksums
from retriever_service.index.updates import add_passages, delete_passages
from retriever_service.passages.corpus import Passage
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_animals

pytestmark = pytest.mark.component

SPEC = EncoderSpec("hash")
SIZE = "64M"


class Disk:
    """A file system of its own, with room for so many files and folders."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def allow(self, more: int | None) -> None:
        """So many more than there are now; None for as many as may come."""
        self._allow(10_000)
        if more is not None:
            self._allow(1 + sum(1 for _ in self.at.rglob("*")) + more)

    def _allow(self, number: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={SIZE},nr_inodes={number}", str(self.at)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    at = tmp_path / "disk"
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(at)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield Disk(at)
    subprocess.run(["umount", "--lazy", str(at)], check=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_animals(tmp_path / "c.jsonl")


def refusals(disk: Disk, call: Callable[[], object]) -> int:
    """How often the call is refused for want of room, with place for one more each time, until it succeeds."""
    told: list[str] = []
    for more in range(60):
        disk.allow(more)
        try:
            call()
            break
        except RetrieverError as error:
            told.append(str(error))
    assert len(told) < 60
    assert all("ake room and run the same" in error for error in told)
    return len(told)


def test_building(disk: Disk, corpus: Path) -> None:
    out = disk.at / "index"
    assert (
        refusals(
            disk,
            lambda: build_index([corpus], out, SPEC, bm25=True, workers=1, load_encoder=load_hash_encoder),
        )
        > 5
    )
    verify_checksums(out)
    assert [path.name for path in disk.at.iterdir()] == ["index"]


def test_encoding(disk: Disk, corpus: Path) -> None:
    out = disk.at / "vectors"
    assert (
        refusals(disk, lambda: encode_corpus([corpus], out, SPEC, workers=1, load_encoder=load_hash_encoder))
        > 3
    )
    encode_corpus([corpus], out, SPEC, workers=1, load_encoder=load_hash_encoder).verify()


def test_adding_and_deleting(disk: Disk, corpus: Path) -> None:
    out = disk.at / "index"
    build_index([corpus], out, SPEC, bm25=True, load_encoder=load_hash_encoder)
    new = [Passage("new", "", "the lynx hides")]
    assert refusals(disk, lambda: add_passages(out, new, HashEncoder(SPEC))) > 2
    (out / "lock").unlink()
    assert refusals(disk, lambda: delete_passages(out, ["a0"])) > 1
    verify_checksums(out)
