"""Queries in the layouts of BEIR, MAIR and ToolRet, and what is counted or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.benchmarks.queries import Query, read_task
from pipeline.core.benchmarks.spec import QueriesConfig
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import read_corpus
from tests.retriever_service.support import write_jsonl

DOCUMENT = {"name": "get_weather", "description": "The weather of a place.", "parameters": {}}


def read(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    write_jsonl(folder / "queries.jsonl", rows)
    return read_task(QueriesConfig(queries="queries.jsonl", **settings), folder, seed=0)


def test_labels_of_toolret_are_json_text_in_parquet(tmp_path: Path) -> None:
    """Its data set has the list as a string, with the tools' documents inside."""
    labels = [
        {"id": "web_1", "doc": DOCUMENT, "relevance": 1},
        {"id": "web_2", "doc": DOCUMENT, "relevance": 1},
    ]
    row = {
        "id": "apigen_query_5",
        "query": "Is it raining?",
        "instruction": "Given a `weather` task, retrieve tools.",
    }
    columns = {key: [value] for key, value in row.items()} | {
        "labels": [json.dumps(labels)],
        "category": ["web"],
    }
    pq.write_table(pa.table(columns), tmp_path / "queries-00000-of-00001.parquet")
    config = QueriesConfig(queries="queries-00000-of-00001.parquet")
    (query,) = read_task(config, tmp_path, seed=0).queries
    assert query == Query(row["id"], row["query"], row["instruction"], {"web_1": 1, "web_2": 1})


def test_tools_of_toolret_and_documents_of_mair_are_passages(tmp_path: Path) -> None:
    documentation = json.dumps(DOCUMENT)
    pq.write_table(pa.table({"id": ["web_1"], "documentation": [documentation]}), tmp_path / "tools.parquet")
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"id": "d1", "doc": "A proof."}])
    tool, doc = read_corpus([tmp_path / "tools.parquet", docs])
    assert (tool.id, tool.title, tool.text) == ("web_1", "", documentation)
    assert (doc.id, doc.text) == ("d1", "A proof.")


def test_labels_of_mair_are_graded(tmp_path: Path) -> None:
    labels = [{"id": 7, "score": 2}, {"id": "d2", "score": 1.0}, {"id": "d3", "score": 0}]
    rows = [{"qid": 1, "query": "A statement.", "instruction": "Retrieve proofs.", "labels": labels}]
    (query,) = read(tmp_path, rows).queries
    assert (query.id, query.gold, query.relevant) == ("1", {"7": 2, "d2": 1, "d3": 0}, ["7", "d2"])


def test_judgements_of_beir_stand_in_a_file_and_what_is_not_asked_is_counted(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq9\tp1\t1\n")
    found = read(
        tmp_path,
        [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}],
        qrels="test.tsv",
        instruction="Find it.",
    )
    assert [(query.id, query.instruction) for query in found.queries] == [("q1", "Find it.")]
    assert (found.unjudged, found.unknown, found.not_drawn) == (1, 1, 0)


def test_the_instruction_of_a_query_is_its_own_else_that_of_the_task(tmp_path: Path) -> None:
    labels = [{"id": "p"}]
    rows = [
        {"id": "a", "question": "?", "labels": labels, "instruction": "Own."},
        {"id": "b", "question": "?", "labels": labels, "instruction": "  "},
        {"id": "c", "question": "?", "labels": labels, "instruction": None},
        {"id": "d", "question": "?", "labels": labels},
    ]
    assert [query.instruction for query in read(tmp_path, rows).queries] == ["Own.", "", "", ""]
    assert [q.instruction for q in read(tmp_path, rows, instruction="Task's.").queries] == [
        "Own.",
        *["Task's."] * 3,
    ]
    assert not read(tmp_path, rows[1:]).has_instructions


def test_a_limit_draws_the_same_queries_each_time_in_their_order(tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "query": "?", "labels": [{"id": "p"}]} for n in range(30)]
    first, second = (read(tmp_path, rows, limit=7) for _ in range(2))
    assert first == second and first.not_drawn == 23
    numbers = [int(query.id[1:]) for query in first.queries]
    assert numbers == sorted(set(numbers)) and len(numbers) == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "labels": []}, "queries.jsonl:1: query 'a' has no text"),
        ({"query": "?", "labels": []}, "queries.jsonl:1: no id"),
        ({"id": "a", "query": "?"}, "queries.jsonl:1: no list of labels (fields: id, query); name a file"),
        ({"id": "a", "query": "?", "labels": "[{"}, "queries.jsonl:1: labels are no JSON"),
        ({"id": "a", "query": "?", "labels": ["p"]}, "a label must be an object with an id, got 'p'"),
        ({"id": "a", "query": "?", "labels": [{"id": "p", "score": 0.5}]}, "the relevance of 'p' must be a whole"),
        ({"id": "a", "query": "?", "labels": [{"id": "p"}, {"id": "p", "score": 2}]}, "passage 'p' is judged twice"),
        ({"id": "a", "query": "?", "labels": [{"id": "p"}], "instruction": 3}, "the instruction must be a string"),
        ({"id": "a", "query": "?", "labels": []}, "no query of"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RetrieverError) as refused:
        read(tmp_path, [row])
    assert message in str(refused.value)


def test_a_query_that_comes_twice_is_refused(tmp_path: Path) -> None:
    rows = [{"id": "a", "query": "?", "labels": [{"id": "p"}]}] * 2
    with pytest.raises(RetrieverError, match=r"queries\.jsonl:2: query 'a' appears twice"):
        read(tmp_path, rows)
