"""Records from files of every layout and in every state: a record, or one clear error that says where."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.passages import json_list, records
from retriever_service.passages.records import open_records

ROWS = [{"id": "1", "text": 'Café, «quoted» "so"'}, {"id": "2", "text": "two\tthree"}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def read(path: Path) -> list[Any]:
    return [record for _, record in open_records(path)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        b"\r\n".join(LINES) + b"\r\n",
        b"\r".join(LINES),
        b"\n\r\n" + LINES[0] + b"\r\n\n  \n" + LINES[1],
        codecs.BOM_UTF8 + b"\n".join(LINES),
        gzip.compress(b"\n".join(LINES)),
        b"[" + b",".join(LINES) + b"]",
        codecs.BOM_UTF8 + b" [\r\n " + b" ,\n".join(LINES) + b"\n]\n",
        gzip.compress(b"[" + b",".join(LINES) + b"]"),
        b'{"Data": [' + b", ".join(LINES) + b'], "Version": 1.0}',
    ],
    ids=["lines", "CRLF", "CR", "blank", "BOM", "gzip", "list", "list with BOM", "list in gzip", "TriviaQA"],
)
@pytest.mark.parametrize("name", ["file.jsonl", "file.json", "file.gz"])
def test_text_files_are_known_by_what_is_in_them(tmp_path: Path, content: bytes, name: str) -> None:
    assert read(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(("suffix", "delimiter"), [(".tsv", "\t"), (".csv", ","), (".tsv.gz", "\t")])
def test_tables_have_their_header_for_names(tmp_path: Path, suffix: str, delimiter: str) -> None:
    text = f'id{delimiter}text\n1{delimiter}"Café, «quoted» ""so"""\n2{delimiter}"two\tthree"\n'.encode()
    content = codecs.BOM_UTF8 + text
    path = write(tmp_path / f"file{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(path) == ROWS


def test_parquet_files_are_read_by_their_columns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "file.parquet")
    assert read(tmp_path / "file.parquet") == ROWS


def test_a_list_is_read_over_the_borders_of_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file.json", json.dumps(ROWS * 3, ensure_ascii=False, indent=1).encode())
    for size in range(1, 40):
        monkeypatch.setattr(json_list, "CHUNK_BYTES", size)
        assert read(path) == ROWS * 3


def test_a_place_is_a_line_an_element_or_a_row(tmp_path: Path) -> None:
    lines = open_records(write(tmp_path / "a.jsonl", b"\n" + LINES[0]))
    assert [lines.place(number) for number, _ in lines] == [f"{tmp_path}/a.jsonl:2"]
    elements = open_records(write(tmp_path / "a.json", b"[" + LINES[0] + b"]"))
    assert [elements.place(number) for number, _ in elements] == [f"{tmp_path}/a.json: element 1"]
    table = open_records(write(tmp_path / "a.csv", b'id,text\n"1\n",a\n2,b\n'))
    assert [table.place(number) for number, _ in table] == [f"{tmp_path}/a.csv:3", f"{tmp_path}/a.csv:4"]


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD = {
    "UTF-16": ("a.jsonl", '{"id": "1"}'.encode("utf-16"), r"UTF-16.*save it as UTF-8"),
    "UTF-16 without a mark": ("a.jsonl", '{"id": "1"}'.encode("utf-16-be"), "UTF-16"),
    "UTF-32": ("a.json", '[{"id": "1"}]'.encode("utf-32"), "UTF-16 or UTF-32"),
    "Latin-1": ("a.jsonl", b'{"id": "1"}\n{"id": "\xe9"}', r"a\.jsonl:2: not valid UTF-8"),
    "Latin-1 in a list": ("a.json", b'[{"id": "1"}, {"id": "\xe9"}]', r"a\.json: element 1: not valid UTF-8"),
    "a surrogate": ("a.jsonl", b'{"id": "1"}\n{"id": "\\uD83D"}', r"a\.jsonl:2: not valid Unicode.*ud83d"),
    "a surrogate in a list": ("a.json", b'[{"id": "\\udc00"}]', r"element 1: not valid Unicode"),
    "digits": ("a.jsonl", b'{"id": ' + b"1" * 5002 + b"}", r"a\.jsonl:1: a number of thousands of digits"),
    "digits in a list": ("a.json", b'[{"id": ' + b"1" * 5002 + b"}]", "element 1: a number of thousands"),
    "depth": ("a.jsonl", DEEP, r"a\.jsonl:1: nested too deep"),
    "depth in a list": ("a.json", b"[" + DEEP + b"]", "element 1: nested too deep"),
    "NUL bytes": ("a.jsonl", LINES[0] + b"\n" + b"\0" * 4096, r"a\.jsonl:2: not valid JSON"),
    "cut line": ("a.jsonl", LINES[0] + b"\n" + LINES[1][:-5], r"a\.jsonl:2: not valid JSON"),
    "pretty": ("a.jsonl", json.dumps(ROWS[0], indent=2).encode(), r"a\.jsonl:1: not valid JSON"),
    "a text": ("a.jsonl", b'"1"', "expected a JSON object, got str"),
    "cut list": (
        "a.json",
        b"[" + LINES[0] + b",",
        "element 2: expected a JSON object, got the end of the file",
    ),
    "cut element": ("a.json", b"[" + LINES[0] + b"," + LINES[1][:-5], "element 2: not valid JSON"),
    "no comma": ("a.json", b"[" + LINES[0] + LINES[1] + b"]", "element 2: expected a comma"),
    "list of lists": ("a.json", b"[[1]]", r"element 1: expected a JSON object, got '\[1\]"),
    "text behind a list": ("a.json", b"[" + LINES[0] + b"]\n[]", "behind the end of the list"),
    "cut gzip": ("a.gz", gzip.compress(LINES[0] * 9)[:-9], "damaged gzip file"),
    "bent gzip": ("a.gz", gzip.compress(LINES[0] * 9)[:15] + b"\0" * 30, "damaged gzip file"),
    "gzip of its magic": ("a.gz", b"\x1f\x8b", "damaged gzip file"),
    "ragged table": ("a.tsv", b"id\ttext\n1\n", r"a\.tsv:2: 1 columns, but the header has 2"),
    "open quote": ("a.csv", b'id,text\n1,"a\n', r"a\.csv:2: not valid as a table"),
    "cut Parquet": ("a.parquet", b"PAR1" + b"\0" * 50, "damaged Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_a_damaged_file_is_one_error_that_says_where(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(RetrieverError, match=message):
        read(write(tmp_path / name, content))


def test_a_line_of_ten_megabytes_is_a_record_and_an_endless_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "1", "text": "a" * 10_000_000}
    lines = write(tmp_path / "a.jsonl", json.dumps(row).encode())
    listed = write(tmp_path / "a.json", json.dumps([row]).encode())
    assert read(lines) == read(listed) == [row]
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2**20)
    with pytest.raises(RetrieverError, match=r"a\.jsonl:1: a line of more than 1,048,576 bytes"):
        read(lines)
    with pytest.raises(RetrieverError, match=r"a\.json: element 1: longer than 1,048,576"):
        read(listed)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "."])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(RetrieverError, match="does not exist"):
        open_records(path)


def _list(rows: list[bytes]) -> bytes:
    return b"[" + b",".join(rows) + b"]"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3), st.one_of(st.text(max_size=9), st.integers(), st.floats()), max_size=3
        ),
        max_size=4,
    ),
    layout=st.sampled_from([_list, b"\n".join, b"\r".join]),
    damage=st.tuples(st.integers(0, 200), st.binary(max_size=4), st.integers(0, 3)),
    compress=st.booleans(),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
)
@example(rows=[{}], layout=_list, damage=(1, b"\xff", 0), compress=False, suffix=".json")
def test_whatever_is_in_a_file_it_is_records_or_one_error(
    tmp_path: Path,
    rows: list[Any],
    layout: Callable[[list[bytes]], bytes],
    damage: tuple[int, bytes, int],
    compress: bool,
    suffix: str,
) -> None:
    content = layout([json.dumps(row).encode() for row in rows])
    content = gzip.compress(content) if compress else content
    at, put, cut = damage
    path = write(tmp_path / f"file{suffix}", content[:at] + put + content[at + cut :])
    try:
        found, complaint = read(path), ""
    except RetrieverError as error:
        found, complaint = [], str(error)
    assert all(isinstance(record, dict) for record in found)
    assert not complaint or str(path) in complaint
