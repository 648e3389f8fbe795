"""A whole benchmark with a hashing encoder: what is encoded once, kept, made again, counted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.benchmarks import cells, running
from pipeline.core.benchmarks.running import run_benchmark
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError
from tests.pipeline.core.benchmarks.support import CountingEncoders, KeywordReranker, benchmark_of
from tests.retriever_service.support import real_data, write_jsonl


def run(folder: Path, *overrides: str, load: Any = None, **changes: Any) -> Any:
    spec = benchmark_of(folder, *overrides, **changes)
    return run_benchmark(spec, folder / "out", Display(), load=load or CountingEncoders())


def test_a_corpus_is_encoded_once_whatever_tasks_arms_and_retrievers_search_it(tmp_path: Path) -> None:
    load = CountingEncoders()
    report = run(tmp_path, load=load)
    assert load.passages == 6 + 4
    assert load.loaded == ["minilm"]
    assert report["cells"] == {"searched": 3 * (1 + 2 + 2), "kept": 0, "outdated": 0}
    assert list(report["retrievers"]) == ["bm25", "hash", "both"]


def test_what_was_ranked_is_kept_and_another_measure_needs_no_search(tmp_path: Path) -> None:
    first = run(tmp_path)
    load = CountingEncoders()
    second = run(tmp_path, "measures=[recall@2, ndcg@10]", load=load)
    assert load.loaded == [] and second["cells"] == {"searched": 0, "kept": 15, "outdated": 0}
    for name, figures in first["retrievers"].items():
        for task, of in figures["tasks"].items():
            now = second["retrievers"][name]["tasks"][task]["without"]
            assert now["ndcg@10"] == of["without"]["ndcg@10"] and "recall@2" in now


def test_a_benchmark_that_was_cut_off_goes_on_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = run(whole)
    write, left = running.write_rankings, [7]

    def killed(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*arguments)

    monkeypatch.setattr(running, "write_rankings", killed)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    found = run(tmp_path / "cut")
    assert found["cells"] == {"searched": 8, "kept": 7, "outdated": 0}
    assert {k: v for k, v in found.items() if k != "cells"} == {
        k: v for k, v in expected.items() if k != "cells"
    }


def test_what_changed_is_ranked_again_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path)
    spec = benchmark_of(tmp_path)
    labels = [{"id": 0}]
    write_jsonl(tmp_path / "land.jsonl", [{"id": "new", "query": "lion", "labels": labels}])
    report = run_benchmark(spec, tmp_path / "out", Display(), load=CountingEncoders())
    assert report["cells"] == {"searched": 3, "kept": 12, "outdated": 3}
    rocks = [{"id": f"r{n}", "title": "", "text": f"stone {n}"} for n in range(4)]
    write_jsonl(tmp_path / "rocks.jsonl", rocks)
    report = run_benchmark(spec, tmp_path / "out", Display(), load=CountingEncoders())
    assert report["cells"] == {"searched": 6, "kept": 9, "outdated": 6}


def test_rankings_of_another_model_or_device_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "encoder"
    model.mkdir()
    (model / "weights").write_text("old")
    read: list[str] = []
    identity = cells.model_identity
    monkeypatch.setattr(cells, "model_identity", lambda name: (read.append(name), identity(name))[1])

    def cells_of(*overrides: str) -> Any:
        retrievers = {"bm25": {"method": "bm25"}, "own": {"encoder": str(model)}}
        return run(tmp_path, *overrides, retrievers=retrievers)["cells"]

    assert cells_of() == {"searched": 10, "kept": 0, "outdated": 0}
    assert read == [str(model)], "its files are read once, whatever tasks and arms there are"
    (model / "weights").write_text("new")
    assert cells_of() == {"searched": 5, "kept": 5, "outdated": 5}
    assert cells_of("device=other") == {"searched": 5, "kept": 5, "outdated": 5}


def test_results_are_a_row_per_query_retriever_and_arm(tmp_path: Path) -> None:
    report = run(tmp_path, "measures=[ndcg@10, all_gold@2]")
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert len(rows) == 3 * (3 + 2 * 2 + 2 * 1)
    of_water = [
        row for row in rows if (row["task"], row["retriever"], row["arm"]) == ("water", "bm25", "with")
    ]
    assert [(row["query_id"], row["domain"], row["instructed"]) for row in of_water] == [
        ("0", "animals", True),
        ("1", "animals", False),
    ]
    mean = 100 * sum(row["ndcg@10"] for row in of_water) / 2
    assert report["retrievers"]["bm25"]["tasks"]["water"]["with"]["ndcg@10"] == pytest.approx(mean)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_what_was_not_asked_is_counted(tmp_path: Path) -> None:
    write = benchmark_of(tmp_path)
    (tmp_path / "stone.tsv").write_text("query-id\tcorpus-id\tscore\ns1\tr3\t2\ns1\tr9\t1\ns7\tr1\t1\n")
    report = run_benchmark(write, tmp_path / "out", Display(), load=CountingEncoders())
    assert report["tasks"]["stone"] == {
        "domain": "rocks",
        "corpus": "rocks",
        "passages": 4,
        "queries": 1,
        "without_instruction": 0,
        "without_relevant": 0,
        "relevant": 2,
        "relevant_not_in_corpus": 1,
        "unjudged": 1,
        "unknown": 1,
        "not_drawn": 0,
        "left_out": 0,
    }
    assert report["tasks"]["water"]["without_instruction"] == 1


def test_a_task_without_instructions_has_one_arm(tmp_path: Path) -> None:
    figures = run(tmp_path)["retrievers"]["hash"]
    assert set(figures["tasks"]["land"]) == {"without"}
    assert set(figures["tasks"]["water"]) == {"without", "with", "difference"}
    assert figures["means"]["tasks"]["difference"]["tasks"] == figures["gains"]["tasks"] == 2


def test_two_tasks_may_have_queries_of_the_same_id(tmp_path: Path) -> None:
    """Ids of ToolRet are unique within a sub-dataset only."""
    report = run(tmp_path, "retrievers={bm25: {method: bm25}}")
    tasks = report["retrievers"]["bm25"]["tasks"]
    assert tasks["land"]["without"] | {"queries": 3, "ndcg@10": 100.0} == tasks["land"]["without"]
    assert tasks["water"]["without"]["queries"] == 2


def test_a_passage_with_the_id_of_the_query_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """ArguAna; elsewhere the same number means nothing."""
    one = {"bm25": {"method": "bm25"}}
    kept = run(tmp_path, retrievers=one)
    assert kept["retrievers"]["bm25"]["tasks"]["land"]["without"]["ndcg@10"] == 100
    left_out = run(tmp_path, "tasks.land.exclude_same_id=true", retrievers=one)
    assert left_out["retrievers"]["bm25"]["tasks"]["land"]["without"]["ndcg@10"] == 0
    assert left_out["cells"]["outdated"] == 1


def test_bm25_searches_the_whole_corpus_for_every_task_with_its_own_judgements(tmp_path: Path) -> None:
    """The released program takes the tools of a task's name only, and the judgements of the last query for all."""
    run(tmp_path, retrievers={"bm25": {"method": "bm25"}})
    rows = pq.read_table(tmp_path / "out" / "rankings" / "bm25" / "water.without.parquet").to_pylist()
    assert [(row["query_id"], row["passages"]) for row in rows] == [("0", ["4"]), ("1", ["2"])]
    found = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    scores = [r["ndcg@10"] for r in found if (r["task"], r["arm"]) == ("water", "without")]
    assert scores[1] == 1 and 0 < scores[0] < 1, "of the two animals of the first query one has its word"


def test_a_reranker_is_opened_once_for_all_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_reranker(model: str, device: str) -> KeywordReranker:
        opened.append(model)
        return KeywordReranker("river")

    monkeypatch.setattr(running.Reranker, "open", open_reranker)
    report = run(tmp_path, retrievers={"again": {"method": "bm25", "rerank": "some/reranker"}})
    assert opened == ["some/reranker"] and report["cells"]["searched"] == 5


def test_generated_tasks_stand_beside_the_others(tmp_path: Path) -> None:
    report = run(
        tmp_path, constraints={"questions": 3, "responses": 6}, retrievers={"bm25": {"method": "bm25"}}
    )
    assert list(report["tasks"])[3:6] == ["punctuation", "keywords", "format"]
    assert report["tasks"]["keywords"]["passages"] == 18
    again = run(
        tmp_path, constraints={"questions": 3, "responses": 6}, retrievers={"bm25": {"method": "bm25"}}
    )
    assert again["cells"]["searched"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["root=/nowhere"], "there is no file /nowhere/animals.jsonl; relative paths start from root"),
        (["tasks.stone.qrels=none.tsv"], "there is no file"),
        (["retrievers.hash.encoder=./nothing"], "there is no model folder ./nothing"),
        (["arms=[with]", "tasks={land: {domain: a, corpus: animals, queries: land.jsonl}}",
          "corpora={animals: animals.jsonl}"],
         "no task has an instruction"),
        (["constraints={questions: 3}", "corpora={animals: animals.jsonl}",
          "tasks={format: {domain: a, corpus: animals, queries: land.jsonl}}"],
         "tasks.format is the name of a generated task; give yours another one"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_made(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    load = CountingEncoders()
    with pytest.raises((UserError, RetrieverError)) as refused:
        run(tmp_path, *overrides, load=load)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists() and load.loaded == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no benchmark"):
        run(tmp_path)


def test_damaged_rankings_are_told_of(tmp_path: Path) -> None:
    run(tmp_path, retrievers={"bm25": {"method": "bm25"}})
    (tmp_path / "out" / "rankings" / "bm25" / "land.without.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"land\.without\.parquet is damaged"):
        run(tmp_path, retrievers={"bm25": {"method": "bm25"}})


def test_bm25_on_toollens_is_as_it_was_measured_elsewhere(tmp_path: Path) -> None:
    """nDCG@10 .341, recall@10 .383, all gold in the top 10 .127, by another program with the same parameters."""
    folder = real_data("toollens")
    tree = {
        "corpora": {"tools": "corpus.jsonl"},
        "tasks": {
            "toollens": {
                "domain": "web",
                "corpus": "tools",
                "queries": "queries.jsonl",
                "qrels": "qrels/test.tsv",
                "instruction": "Retrieve tools.",
            }
        },
        "retrievers": {"bm25": {"method": "bm25"}},
        "measures": ["ndcg@10", "recall@10", "all_gold@10"],
        "arms": ["without"],
    }
    report = run(tmp_path, f"root={folder}", **tree)
    found = report["retrievers"]["bm25"]["tasks"]["toollens"]["without"]
    assert report["tasks"]["toollens"]["queries"] == 934
    assert [found[name] for name in tree["measures"]] == pytest.approx([34.1, 38.3, 12.7], abs=1)
