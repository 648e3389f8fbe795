"""Adding and deleting passages: what is found afterwards, what a kill leaves, what is refused."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.building import build
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.errors import RetrieverError
from retriever_service.files import exclusive
from retriever_service.index import store, updates
from retriever_service.index.store import read_manifest, verify_checksums
from retriever_service.index.updates import add_passages, delete_passages
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl

SPEC = EncoderSpec("hash")
build_index = partial(build.build_index, load_encoder=load_hash_encoder, workers=1)
open_engine = partial(SearchEngine.open, load_encoder=load_hash_encoder)
WORDS = ["lion", "tiger", "otter", "eagle", "river", "cliff", "desert"]


def passage(number: int) -> Passage:
    return Passage(f"p{number}", f"Title {number}", f"{WORDS[number % 7]} {WORDS[number % 5]} number{number}")


def rows(numbers: Any) -> list[dict[str, str]]:
    return [{"id": p.id, "title": p.title, "text": p.text} for p in map(passage, numbers)]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """An index of passages 0 to 9."""
    build_index([write_jsonl(tmp_path / "c.jsonl", rows(range(10)))], tmp_path / "index", SPEC, bm25=True)
    return tmp_path / "index"


def ids(engine: SearchEngine, query: str = "lion", k: int = 100, **options: Any) -> list[str]:
    (hits,) = engine.search([query], k, SearchOptions(**options))
    return [hit.passage.id for hit in hits]


def found(engine: SearchEngine, k: int) -> list[list[tuple[str, float]]]:
    return [[(h.passage.id, h.score) for h in hits] for hits in engine.search(WORDS, k)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_an_updated_index_answers_like_one_built_of_its_passages(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("updates")
    build_index([write_jsonl(tmp_path / "c.jsonl", rows(range(4)))], tmp_path / "index", SPEC)
    present, next_number = set(range(4)), 4
    engine = open_engine(tmp_path / "index")
    for _ in range(data.draw(st.integers(1, 5))):
        if len(present) > 1 and data.draw(st.booleans()):
            gone = data.draw(st.sets(st.sampled_from(sorted(present)), min_size=1, max_size=len(present) - 1))
            assert engine.delete([f"p{n}" for n in gone]) == len(present - gone)
            present -= gone
        else:
            count = data.draw(st.integers(1, 4))
            new = range(next_number, next_number + count)
            engine.add([passage(n) for n in new])
            present |= set(new)
            next_number += count
    fresh = [{"id": p.id, "title": p.title, "text": p.text} for p in map(passage, sorted(present))]
    build_index([write_jsonl(tmp_path / "fresh.jsonl", fresh)], tmp_path / "fresh", SPEC)
    # Rows were added in the order of the numbers, so that ties are broken alike.
    for k in (1, 3, 100):
        expected = found(open_engine(tmp_path / "fresh"), k)
        assert found(engine, k) == expected
        assert found(open_engine(tmp_path / "index"), k) == expected
    verify_checksums(tmp_path / "index")


def test_additions_are_merged_so_that_segments_stay_few(ten: Path) -> None:
    encoder = HashEncoder(SPEC)
    for number in range(10, 74):
        add_passages(ten, [passage(number)], encoder)
    assert len(read_manifest(ten).segments) <= 7
    assert set(ids(open_engine(ten))) == {f"p{n}" for n in range(74)}


def test_words_and_filters_see_additions_and_deletions(ten: Path) -> None:
    engine = open_engine(ten)
    new = Passage("new", "Zebra", "the zebra grazes", {"year": 2001})
    engine.add([new])
    assert ids(engine, "zebra", method="bm25") == ["new"]
    assert ids(engine, "zebra", method="hybrid")[0] == "new"
    engine.delete(["new", "p3"])
    assert ids(engine, "zebra", method="bm25") == []
    assert "p3" not in ids(engine, "eagle", method="hybrid")


def test_a_deleted_id_may_come_again_with_other_content(ten: Path) -> None:
    engine = open_engine(ten)
    engine.delete(["p1"])
    engine.add([Passage("p1", "Zebra", "the zebra grazes")])
    (hits,) = engine.search(["the zebra grazes"], 1)
    assert (hits[0].passage.id, hits[0].passage.title) == ("p1", "Zebra")


def test_an_engine_takes_up_the_updates_of_others(ten: Path) -> None:
    reader = open_engine(ten)
    before = reader.fingerprint
    assert not reader.refresh()
    delete_passages(ten, ["p0"])
    assert "p0" in ids(reader)
    assert reader.refresh() and reader.fingerprint != before
    assert "p0" not in ids(reader)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([], "no passages"),
        ([passage(3)], "a passage 'p3' already"),
        ([passage(11), passage(11)], "comes 2 times"),
        ([Passage("x", "", "  ")], "needs an id and a text"),
        ([Passage("x", "", "\ud800")], "not valid Unicode"),
    ],
)
def test_an_addition_that_cannot_be_made_changes_nothing(ten: Path, new: list[Passage], message: str) -> None:
    before = state(ten)
    with pytest.raises(RetrieverError, match=message):
        add_passages(ten, new, HashEncoder(SPEC))
    assert state(ten) == before


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([], "no ids"),
        (["nobody"], "no passage 'nobody'"),
        ([f"p{n}" for n in range(10)], "all of its passages"),
    ],
)
def test_a_deletion_that_cannot_be_made_changes_nothing(ten: Path, gone: list[str], message: str) -> None:
    before = state(ten)
    with pytest.raises(RetrieverError, match=message):
        delete_passages(ten, gone)
    assert state(ten) == before


def test_another_encoder_cannot_add(ten: Path) -> None:
    with pytest.raises(RetrieverError, match=r"'hash'.*'other'"):
        add_passages(ten, [passage(11)], HashEncoder(EncoderSpec("other")))


def test_two_updates_at_a_time_are_refused(ten: Path) -> None:
    with exclusive(ten / updates.LOCK_FILE), pytest.raises(RetrieverError, match="another process"):
        delete_passages(ten, ["p0"])


@pytest.mark.parametrize("step", range(6))
def test_an_update_killed_at_any_step_is_whole_or_absent(ten: Path, step: int) -> None:
    """The process ends at the `step`-th file that gets its name; afterwards everything works."""
    child = os.fork()
    if child == 0:
        left = step
        replace = os.replace

        def die(*arguments: Any) -> None:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            replace(*arguments)

        os.replace = die  # type: ignore[assignment]
        add_passages(ten, [passage(20)], HashEncoder(SPEC))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.waitstatus_to_exitcode(status) == 9
    present = set(ids(open_engine(ten)))
    assert present == {f"p{n}" for n in range(10)} | ({"p20"} if not killed else set())
    verify_checksums(ten)
    add_passages(ten, [passage(21)], HashEncoder(SPEC))
    assert set(ids(open_engine(ten))) == present | {"p21"}
    unused = [p.name for p in (ten / "segments").iterdir()]
    assert sorted(unused) == sorted(Path(s.name).name for s in read_manifest(ten).segments)


def test_a_reader_that_opens_while_an_update_removes_files_gets_the_new_state(
    ten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = store._open, []

    def meanwhile(directory: Path, manifest: Any) -> Any:
        if not calls:
            calls.append(1)
            add_passages(ten, [passage(n) for n in range(10, 30)], HashEncoder(SPEC))
        return real(directory, manifest)

    monkeypatch.setattr(store, "_open", meanwhile)
    assert open_engine(ten).manifest.num_passages == 30


def state(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and p.name != updates.LOCK_FILE
    }


def test_damaged_tombstones_are_refused(ten: Path) -> None:
    delete_passages(ten, ["p0"])
    name = read_manifest(ten).tombstones
    assert name is not None
    content = bytearray((ten / name).read_bytes())
    content[-8:] = np.int64(10**6).tobytes()
    (ten / name).write_bytes(content)
    with pytest.raises(RetrieverError, match="damaged"):
        open_engine(ten)
