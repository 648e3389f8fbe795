"""Reading corpora in every dialect, what is refused and how, and the file that passages are served from."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.passages import corpus as corpus_module
from retriever_service.passages.corpus import Corpus, CorpusReader, Passage, read_corpus, write_passages
from tests.retriever_service.support import write_jsonl

GOOD = {"id": "1", "title": "T", "text": "body"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, Passage("1", "T", "body")),
        ({"_id": "1", "title": "T", "text": "body", "metadata": {}}, Passage("1", "T", "body")),
        ({"id": "1", "text": "body"}, Passage("1", "", "body")),
        ({"id": 1, "text": "body"}, Passage("1", "", "body")),
        ({"id": "1", "title": None, "text": "body"}, Passage("1", "", "body")),
        ({"id": "1", "contents": '"T"\nbody\nmore'}, Passage("1", "T", "body\nmore")),
        ({"id": "1", "contents": "T\nbody"}, Passage("1", "T", "body")),
        ({"id": "1", "contents": "body only"}, Passage("1", "", "body only")),
    ],
)
def test_every_dialect_gives_the_same_passage(tmp_path: Path, row: dict[str, Any], expected: Passage) -> None:
    assert list(read_corpus([write_jsonl(tmp_path / "c.jsonl", [row])])) == [expected]


def test_compressed_file_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(f"\n{json.dumps(GOOD)}\n\n".encode()))
    assert [passage.id for passage in read_corpus([path])] == ["1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", "\ufeff" + json.dumps(GOOD)),
        ("c.json", json.dumps([GOOD], indent=2)),
        ("psgs.tsv", "id\ttext\ttitle\n1\tbody\tT\n"),
    ],
    ids=["byte order mark", "list", "table of DPR"],
)
def test_a_corpus_may_come_in_any_layout_of_records(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(read_corpus([tmp_path / name])) == [Passage("1", "T", "body")]


def test_a_corpus_may_be_named_from_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "c.jsonl", [GOOD])
    assert len(list(read_corpus(["~/c.jsonl"]))) == 1


def test_metadata_of_a_saved_dataset_that_are_no_json_are_refused_with_their_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": "1", "text": "x", "metadata": {"on": datetime.date(2020, 1, 1)}}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(RetrieverError, match="set: row 1: 'metadata' has a value that JSON does not have"):
        list(read_corpus([tmp_path / "set"]))


def test_saved_dataset_is_read_by_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"id": "1", "contents": '"T"\nbody'}]).save_to_disk(str(tmp_path / "set"))
    assert list(read_corpus([tmp_path / "set"])) == [Passage("1", "T", "body")]


def test_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="save_to_disk"):
        list(read_corpus([tmp_path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2", "text": ', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"id": "2"}', "no field 'text'"),
        ('{"text": "body"}', "no field 'id'"),
        ('{"id": true, "text": "body"}', "'id' must be a string, is bool"),
        ('{"id": 2.0, "text": "body"}', "'id' must be a string, is float"),
        ('{"id": "2", "title": 3, "text": "body"}', "'title' must be a string, is int"),
        ('{"id": "2", "text": " "}', "'2' has no text"),
        ('{"id": "2", "contents": "T\\n"}', "'2' has no text"),
        ('{"id": "", "text": "body"}', "id is empty"),
        ('{"id": "2", "text": "\\ud800"}', "not valid Unicode"),
        ('{"id": "2", "text": "x", "metadata": {"a": "\\ud800"}}', "not valid Unicode"),
        ('{"id": "2", "text": "x", "metadata": {"a": [NaN]}}', "a value that JSON does not have"),
        ('{"id": "2", "text": "x", "metadata": {"a": -Infinity}}', "a value that JSON does not have"),
        ('{"id": "2", "text": "x", "metadata": ["a"]}', "must be an object, is list"),
        (
            '{"id": "2", "text": "x", "metadata": {"a": ' + "[" * 64 + "]" * 64 + "}}",
            "nested deeper than 64 levels",
        ),
        ('{"id": "1", "title": "T", "text": "body"}', "'1' appears twice; first at .*c.jsonl:1"),
    ],
)
def test_mistake_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(RetrieverError, match=rf"c\.jsonl:3: .*{message}"):
        list(read_corpus([path]))


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "1", "text": "caf\xe9"}\n')
    with pytest.raises(RetrieverError, match=r"c\.jsonl:1: not valid UTF-8"):
        list(read_corpus([path]))


def test_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:-12])
    with pytest.raises(RetrieverError, match="damaged gzip"):
        list(read_corpus([path]))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(RetrieverError, match=r"c\.jsonl: no passages"):
        list(read_corpus([path]))


@pytest.mark.parametrize("sources", [[], "c.jsonl"])
def test_sources_must_be_a_list_of_at_least_one(sources: Any) -> None:
    with pytest.raises(RetrieverError, match="at least one"):
        read_corpus(sources)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "hf:", "hf:a:b:c:d"])
def test_source_that_cannot_be_is_refused(source: str) -> None:
    with pytest.raises(RetrieverError, match=f"{source}"):
        list(read_corpus([source]))


def test_union_counts_equal_passages_once(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    second = write_jsonl(
        tmp_path / "b.jsonl", [{"id": "1", "contents": "T\nbody"}, {"id": "2", "text": "new"}]
    )
    reader = CorpusReader([first, second])
    assert [passage.id for passage in reader] == ["1", "2"]
    assert (reader.num_passages, reader.num_duplicates) == (2, 1)


def test_union_takes_copies_that_differ_in_spacing_and_punctuation_for_equal_and_keeps_the_first(
    tmp_path: Path,
) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [GOOD | {"text": "Rucker (born 1954) sang."}])
    second = write_jsonl(tmp_path / "b.jsonl", [GOOD | {"text": "Rucker( born 1954)  sang"}])
    assert [passage.text for passage in read_corpus([first, second])] == ["Rucker (born 1954) sang."]


def test_union_refuses_one_id_with_two_contents_and_names_both_lines(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"id": "0", "text": "x"}, GOOD])
    second = write_jsonl(tmp_path / "b.jsonl", [GOOD | {"text": "other"}])
    with pytest.raises(RetrieverError, match=r"b\.jsonl:1: id '1' has different content.*a\.jsonl:2"):
        list(read_corpus([first, second]))


def test_checksum_depends_on_content_and_order_not_on_dialect(tmp_path: Path) -> None:
    def checksum(*rows: dict[str, Any]) -> str:
        reader = CorpusReader([write_jsonl(tmp_path / "c.jsonl", rows)])
        list(reader)
        return reader.checksum

    other = {"id": "2", "text": "b"}
    reference = checksum(GOOD, other)
    assert reference == checksum({"id": "1", "contents": '"T"\nbody'}, other)
    assert reference != checksum(other, GOOD)
    assert reference != checksum(GOOD | {"title": "Tb", "text": "ody"}, other)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.builds(Passage, TEXT, TEXT, TEXT), max_size=12))
def test_served_passages_are_the_written_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Passage]
) -> None:
    monkeypatch.setattr(corpus_module, "ROWS_PER_BATCH", 4)
    write_passages(rows, tmp_path / "p.arrow")
    corpus = Corpus(tmp_path / "p.arrow")
    assert len(corpus) == len(rows)
    assert [corpus[row] for row in range(len(rows))] == rows
    assert list(corpus) == rows


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(
        st.lists(
            st.builds(Passage, TEXT, TEXT, TEXT, st.sampled_from([{}, {"year": 1990}])),
            min_size=1,
            max_size=9,
        ),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
def test_rows_are_copied_into_another_file_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[list[Passage]], data: st.DataObject
) -> None:
    monkeypatch.setattr(corpus_module, "ROWS_PER_BATCH", 4)
    for number, part in enumerate(parts):
        write_passages(part, tmp_path / f"{number}.arrow")
    rows = [passage for part in parts for passage in part]
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    source = Corpus(*(tmp_path / f"{number}.arrow" for number in range(len(parts))))
    source.write_rows(start, stop, tmp_path / "copy.arrow")
    copy = Corpus(tmp_path / "copy.arrow")
    assert list(copy) == rows[start:stop]
    assert [copy[row] for row in range(len(copy))] == rows[start:stop]


@pytest.mark.parametrize("row", [-1, 1])
def test_row_outside_the_corpus_is_an_error(tmp_path: Path, row: int) -> None:
    write_passages([Passage("1", "", "x")], tmp_path / "p.arrow")
    with pytest.raises(IndexError, match="corpus of 1 passages"):
        Corpus(tmp_path / "p.arrow")[row]


def test_damaged_passage_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.arrow").write_bytes(b"nonsense")
    with pytest.raises(RetrieverError, match=r"p\.arrow: cannot be read"):
        Corpus(tmp_path / "p.arrow")
