"""Whatever a file looks like, its reader gives records or one error in words: no traceback, and never nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.odd_files.damages import DAMAGES
from bench.odd_files.data import made_of_data
from bench.odd_files.directories import directories
from bench.odd_files.readers import Reader, data_files
from bench.odd_files.trial import MENDABLE, Outcome, trials

READERS = [*data_files(), *made_of_data(), *directories()]
SLOW = ("words of an index", "an index that is opened", "shards of a phase")
"""These open a whole index or phase for every damage."""


def _given(reader: Reader) -> Any:
    return pytest.param(reader, id=reader.name, marks=[pytest.mark.chaos] if reader.name in SLOW else [])


@pytest.mark.parametrize("reader", [_given(reader) for reader in READERS])
def test_an_odd_file_is_read_or_refused_in_words_that_name_it(reader: Reader) -> None:
    outcomes = list(trials(reader))
    assert [one for one in outcomes if not one.is_right] == []
    as_they_are = [one for one in outcomes if one.damage == "as it is"]
    assert [one.kind for one in as_they_are] == ["records"] * len(reader.files)
    assert [one for one in outcomes if len(one.text) > 2000] == []
    unnamed = [one for one in outcomes if one.kind == "error" and not _is_named(reader, one)]
    assert unnamed == []


def _is_named(reader: Reader, outcome: Outcome) -> bool:
    """By its own name, by that of a file or folder that it belongs to, or by the key that is wrong in it."""
    names = [*(Path(file).name for file in reader.files), "copy", "configuration key"]
    return any(name in outcome.text for name in names)


@pytest.mark.parametrize("reader", data_files(), ids=lambda reader: reader.name)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_bytes_ends_in_a_traceback(tmp_path: Path, reader: Reader, data: st.DataObject) -> None:
    (file,) = reader.files
    reader.make(tmp_path)
    content = (tmp_path / file).read_bytes()
    start = data.draw(st.integers(0, len(content)), "where")
    cut = data.draw(st.integers(0, 8), "bytes taken out")
    odd = st.binary(max_size=8) | st.sampled_from(
        [b'"', b"{", b"[", b"\\u", b"\x00", b"\n", b"\t", b"1e999", b"-"]
    )
    put = data.draw(odd, "bytes put in")
    (tmp_path / file).write_bytes(content[:start] + put + content[start + cut :])
    try:
        records = reader.read(tmp_path)
    except MENDABLE:
        return
    assert records or reader.may_be_empty


def test_a_reader_that_gives_nothing_or_raises_what_it_should_not_is_found() -> None:
    def crash(folder: Path) -> int:
        raise KeyError("id")

    def write(folder: Path) -> None:
        (folder / "file").write_bytes(b"x")

    def kinds(read: object) -> set[str]:
        reader = Reader("one", write, read, ["file"])  # type: ignore[arg-type]
        return {one.kind for one in trials(reader)}

    assert kinds(crash) == {"crashed"}
    assert kinds(lambda folder: 0) == {"silent"}
    assert len(DAMAGES) > 50
