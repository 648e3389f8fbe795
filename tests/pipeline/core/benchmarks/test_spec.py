"""A benchmark's file: what is read, and what is refused with a mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.benchmarks.spec import Benchmark, read_benchmark
from pipeline.core.errors import UserError
from pipeline.core.shipped import CONFIGS, find_shipped

FILE: dict[str, Any] = {
    "title": "two tasks",
    "corpora": {"tools": "tools.jsonl"},
    "tasks": {
        "web": {"domain": "web", "corpus": "tools", "queries": "web.jsonl"},
        "code": {"domain": "code", "corpus": "tools", "queries": "code.jsonl", "qrels": "qrels.tsv"},
    },
    "retrievers": {"bm25": {"method": "bm25"}, "minilm": {}},
}


def read(folder: Path, *overrides: str, **changes: Any) -> Benchmark:
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    return read_benchmark(path, overrides)


def test_tasks_share_a_corpus_by_its_name(tmp_path: Path) -> None:
    spec = read(tmp_path)
    assert {task.corpus for task in spec.tasks.values()} == {"tools"}
    assert spec.corpora == {"tools": ("tools.jsonl",)}
    assert (spec.arms, spec.measures) == (("without", "with"), ("ndcg@10",))
    assert (spec.retrievers["minilm"].encoder_name, spec.retrievers["bm25"].encoder_name) == ("minilm", None)


@pytest.mark.parametrize("files", ["tools.jsonl", ["tools.jsonl"], ["web.jsonl", "code.jsonl"]])
def test_a_corpus_is_one_file_or_several(tmp_path: Path, files: Any) -> None:
    """The released program of ToolRet fails on its own example, which gives a list where it takes a text."""
    spec = read(tmp_path, corpora={"tools": files})
    assert spec.corpora["tools"] == tuple([files] if isinstance(files, str) else files)


def test_keys_of_the_file_are_overridden_one_by_one(tmp_path: Path) -> None:
    spec = read(tmp_path, "root=/data", "tasks.web.limit=5", "measures=[recall@20]")
    assert spec.path("tools.jsonl") == Path("/data/tools.jsonl")
    assert spec.tasks["web"].limit == 5 and spec.tasks["code"].limit is None
    assert spec.measures == ("recall@20",)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retriever=minilm"], "unknown key retriever; did you mean retrievers?"),
        (["tasks.web.domian=web"], "unknown key tasks.web.domian; did you mean domain?"),
        (["retrievers.bm25.methd=bm25"], "unknown key retrievers.bm25.methd; did you mean method?"),
        (["constraints.question=3"], "unknown key constraints.question; did you mean questions?"),
        (["tasks.web.corpus=tool"], "tasks.web.corpus: there is no corpus tool; did you mean tools?"),
        (["corpora.idle=idle.jsonl"], "no task searches idle; remove it"),
        (["measures=[ndgc@10]"], "should be a measure and a depth, such as ndcg@10"),
        (["measures=[ndcg@0]"], "should be a measure and a depth"),
        (["measures=[recall@200]"], "recall@200 looks deeper than depth (100); set depth to 200 at least"),
        (["arms=[with, with]"], "name each one once"),
        (["retrievers.bm25.encoder=minilm"], "encoder belongs to method: dense or hybrid, not bm25"),
        (["retrievers.bm25.candidates=20"], "candidates belongs to rerank"),
        (['retrievers.minilm.instruction_format="{instruction}"'], "should have the field {query}"),
        (['retrievers.minilm.query_format="{query} {text}"'], "should have no field {text}; a brace by itself"),
        (['retrievers.minilm.query_format="{query} {query.x}"'], "should have no field {query.x}"),
        (['retrievers.minilm.query_format="{query"'], "retrievers.minilm.query_format: expected '}'"),
        (["tasks={}"], "there are no tasks"),
        (["retrievers={}"], "retrievers: dictionary should have at least 1 item"),
        (["tasks.a/b={domain: web, corpus: tools, queries: q.jsonl}"], "names a file"),
        (["title"], "is not of the form key=value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_mend(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, *overrides)
    assert message in str(refused.value)


def test_a_benchmark_is_found_by_its_name(tmp_path: Path) -> None:
    assert find_shipped("benchmarks", "constraints").is_file()
    assert find_shipped("benchmarks", "./mine.yaml") == Path("./mine.yaml")
    with pytest.raises(UserError, match="there is no benchmark constraint; did you mean constraints"):
        find_shipped("benchmarks", "constraint")
    with pytest.raises(UserError, match="there is no benchmark file"):
        read_benchmark(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_benchmark_is_one(path: Path) -> None:
    read_benchmark(path)
