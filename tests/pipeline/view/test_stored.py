"""How much of a run's files is read: what a page costs does not grow with the run."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.core.run import ROWS_PER_GROUP, write_records, write_table
from pipeline.view import stored
from pipeline.view.pages import Pages
from pipeline.view.stored import questions_in, read_rows
from tests.pipeline.view_support import Writer, asked

MANY = 20 * ROWS_PER_GROUP


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    read_bytes = 0
    opened = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        Counted.read_bytes += len(found)
        return found


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    def opened(path: Path) -> pa.PythonFile:
        Counted.opened += 1
        return pa.PythonFile(Counted(path))

    class File(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, path: Path, **more: Any) -> None:
            super().__init__(opened(path), **more)

    class Counting:
        ParquetFile = File
        read_metadata = staticmethod(lambda path: pq.read_metadata(opened(path)))
        read_schema = staticmethod(lambda path: pq.read_schema(opened(path)))

    monkeypatch.setattr(stored, "pq", Counting)
    Counted.read_bytes = Counted.opened = 0
    return Counted


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A test of many questions, which are three ones over and over."""
    writer = Writer(tmp_path / "run", asked(3))
    writer.evaluated("test/best", "101")
    few = pq.read_table(writer.path / "test/best.parquet")
    table = pa.concat_tables([few] * (MANY // 3 + 1)).slice(0, MANY).combine_chunks()
    numbers = pc.cast(pa.array(range(MANY)), pa.string())
    ids = pc.binary_join_element_wise(table.column("question_id"), numbers, "-")
    write_records(writer.path / "test/best.parquet", table.set_column(0, "question_id", ids))
    return writer.path


def cost(counted: type[Counted], pages: Pages, name: str) -> int:
    before = counted.read_bytes
    assert pages.page(name)
    return counted.read_bytes - before


def test_a_page_reads_the_row_groups_that_it_shows(run: Path, counted: type[Counted]) -> None:
    path = run / "test/best.parquet"
    group = path.stat().st_size / pq.read_metadata(path).num_row_groups
    pages = Pages([run], live=True)
    for name in ("run/0", "rows/0/test-best/table/0", "details/0/test-best/table/0", "ids/0/test-best/1/0"):
        pages.page(name)  # what is known of the file from now on

    assert cost(counted, pages, "details/0/test-best/table/100") <= group
    assert cost(counted, pages, "rows/0/test-best/table/3") <= (1024 / ROWS_PER_GROUP) * group
    assert cost(counted, pages, "ids/0/test-best/7/3") == 0


def test_a_run_that_did_not_change_is_not_read_again(run: Path, counted: type[Counted]) -> None:
    pages = Pages([run], live=True)
    pages.page("run/0")
    opened = counted.opened
    pages.page("run/0")
    assert (counted.opened, opened > 0) == (opened, True)

    path = run / "test/best.parquet"
    write_records(path, pq.read_table(path).slice(0, 5))
    os.utime(path, (1, 1))
    assert pages.page("run/0")["sources"][0]["parts"] == [{"name": "table", "rows": 5}]
    assert counted.opened == opened + 1


def test_files_of_one_row_group_open_all_the_same(run: Path) -> None:
    path = run / "test/best.parquet"
    pages = Pages([run], live=True)
    names = ("details/0/test-best/table/100", "rows/0/test-best/table/3")
    now = [pages.page(name) for name in names]

    write_table(path, pq.read_table(path))
    assert pq.read_metadata(path).num_row_groups == 1
    assert [pages.page(name) for name in names] == now


@pytest.mark.parametrize(("first", "end"), [(0, 1), (3, 4), (3, 9), (4, 8), (9, 10), (0, 10)])
def test_rows_across_groups(tmp_path: Path, first: int, end: int) -> None:
    write_table(tmp_path / "t.parquet", pa.table({"a": list(range(10))}), rows_per_group=4)

    assert read_rows(tmp_path / "t.parquet", first, end, ["a"]).column("a").to_pylist() == list(
        range(first, end)
    )


def test_a_question_has_its_rows_beside_each_other(tmp_path: Path) -> None:
    for ids, starts in ((["a", "a", "b", "c", "c"], [0, 2, 3, 5]), ([], [0])):
        path = tmp_path / f"{len(ids)}.parquet"
        write_table(path, pa.table({"question_id": pa.array(ids, pa.string())}), rows_per_group=2)
        found = questions_in(path)
        assert (found.ids.to_pylist(), found.starts.tolist()) == (sorted(set(ids)), starts)
