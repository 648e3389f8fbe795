"""An index on a disk of the machine's own: complete, of the same state, made once, and never in anybody's way."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from retriever_service import files
from retriever_service.building import build
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.index.local_copy import LOCK_FILE, LocalCopy
from retriever_service.index.store import verify_checksums
from retriever_service.index.updates import add_passages
from retriever_service.passages.corpus import Passage
from retriever_service.search.engine import SearchEngine
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_animals

SPEC = EncoderSpec("hash")
QUERIES = ["the lion", "rivers", "cliffs"]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    corpus = write_animals(tmp_path / "c.jsonl")
    build.build_index(
        [corpus], tmp_path / "index", SPEC, bm25=True, load_encoder=load_hash_encoder, workers=1
    )
    return tmp_path / "index"


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    return tmp_path / "nvme" / "indexes"


open_engine = partial(SearchEngine.open, load_encoder=load_hash_encoder)


def copies(folder: Path) -> list[Path]:
    """All that is there beside the lock."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK_FILE)


def grow(index: Path) -> None:
    add_passages(index, [Passage("new", "Zebra", "the zebra grazes")], HashEncoder(SPEC))


def test_a_copy_answers_as_the_index_does_also_when_that_is_out_of_reach(index: Path, nvme: Path) -> None:
    with_index = open_engine(index)
    expected, fingerprint = with_index.search(QUERIES, 3), with_index.fingerprint
    copy = LocalCopy(index, nvme)
    shutil.rmtree(index)
    engine = open_engine(copy.directory)
    assert (engine.search(QUERIES, 3), engine.fingerprint) == (expected, fingerprint)
    verify_checksums(copy.directory)
    assert copies(nvme) == [copy.directory]


def test_processes_that_come_together_make_one_copy(
    index: Path, nvme: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(4) as replicas:
        made = list(replicas.map(lambda _: LocalCopy(index, nvme), range(4)))
    assert len({copy.directory for copy in made}) == 1
    assert len([line for line in caplog.messages if line.startswith("copying")]) == 1


def test_an_index_that_has_changed_is_copied_anew_and_the_old_copy_goes_once_nobody_holds_it(
    index: Path, nvme: Path
) -> None:
    first = LocalCopy(index, nvme)
    grow(index)
    second = LocalCopy(index, nvme)
    assert open_engine(second.directory).search(["zebra"], 1)[0][0].passage.id == "new"
    assert set(copies(nvme)) == {first.directory, second.directory}
    del first
    add_passages(index, [Passage("newer", "Gnu", "the gnu grazes too")], HashEncoder(SPEC))
    third = LocalCopy(index, nvme)
    assert set(copies(nvme)) == {second.directory, third.directory}


def test_a_copy_that_was_cut_short_or_off_is_made_anew_and_what_is_not_ours_stays(
    index: Path, nvme: Path
) -> None:
    directory = LocalCopy(index, nvme).directory
    (passages,) = directory.rglob("passages.arrow")
    passages.write_bytes(passages.read_bytes()[:-1])
    (cut_off := nvme / f".index-{'0' * 64}.partial").mkdir()
    (mine := nvme / "notes").mkdir()
    assert LocalCopy(index, nvme).directory == directory
    verify_checksums(directory)
    assert mine.exists() and not cut_off.exists()


def test_a_damaged_index_is_refused_and_leaves_no_copy(index: Path, nvme: Path) -> None:
    (passages,) = index.rglob("passages.arrow")
    changed = bytearray(passages.read_bytes())
    changed[len(changed) // 2] ^= 1
    passages.write_bytes(changed)
    with pytest.raises(RetrieverError, match=r"passages\.arrow was changed since it was written"):
        LocalCopy(index, nvme)
    assert copies(nvme) == []


def test_too_small_a_disk_is_told_of_before_anything_is_copied(
    index: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    with pytest.raises(
        RetrieverError, match=r"a copy of .*index needs about .* bytes of disk, 1,000 are free"
    ):
        LocalCopy(index, nvme)
    assert copies(nvme) == []


def test_a_folder_that_cannot_be_is_told_of(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrieverError, match=r"index cannot be copied to .*file"):
        LocalCopy(index, tmp_path / "file")
