"""`exsearch data` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.pipeline.commands_support import question
from tests.pipeline.core.data.fetch import layouts
from tests.retriever_service.support import write_jsonl

CHECK = ("data", "check", "--config", "config.yaml")


def test_a_check_says_what_leaks_and_what_the_corpus_lacks(run_command: Any, folder: Path) -> None:
    leaked = question("dev1") | {"question": "question TRAIN0"}
    lost = {"id": "dev2", "question": "Who?", "answers": ["Nobody"], "supporting_ids": ["p9"]}
    write_jsonl(folder / "dev.jsonl", [question("dev0"), leaked, lost])
    result = run_command(*CHECK)
    assert result.exit_code == 0, result.output
    assert "66.7%" in result.stdout
    lines = result.stdout.splitlines()
    assert (
        "1 questions of dev are also in train, in the same words under other ids (train0 and dev1); take them out of "
        "one of the two"
    ) in lines
    assert "1 questions of dev name gold passages that the corpus does not have (p9)" in lines
    (legend,) = [line for line in lines if line.startswith("judged: ")]
    assert all(f"{column}: " in legend for column in ("covered", "gold there", "answer there"))


def test_a_check_is_one_object_for_programs(run_command: Any) -> None:
    found = json.loads(run_command(*CHECK, "--json").stdout)
    assert found["questions"] == {"train": 3, "dev": 3}
    assert found["passages"]["passages"] == 4
    assert found["coverage"]["dev"]["percent"] == 100.0


def test_the_passages_of_an_index_are_looked_at_where_no_corpus_is_named(
    run_command: Any, index: Path
) -> None:
    found = json.loads(run_command(*CHECK, "data.corpus=[]", f"retriever.index={index}", "--json").stdout)
    assert found["passages"]["passages"] == 4


def test_without_passages_questions_alone_are_checked(run_command: Any) -> None:
    result = run_command(*CHECK, "data.corpus=[]")
    assert "no passages were looked at: set data.corpus, or retriever.index" in result.stdout
    assert "judged: " not in result.stdout


def test_a_question_of_two_splits_by_its_id_is_refused(refused: Any, folder: Path) -> None:
    write_jsonl(folder / "dev.jsonl", [question("train0")])
    assert "1 questions of data.dev are also in data.train (train0)" in refused(*CHECK)


def test_a_check_of_nothing_is_refused(refused: Any) -> None:
    assert "there are no questions to look at" in refused(*CHECK, "data.train=[]", "data.dev=[]")


def test_a_fetched_set_can_be_checked_as_it_is(run_command: Any, folder: Path) -> None:
    (folder / "copy").mkdir()
    layouts.hotpot_originals(folder / "copy")
    result = run_command("data", "fetch", "hotpotqa", "--from", "copy", "--out", "hotpot")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["passages"], summary["coverage"]) == (7, {"train": 100.0, "dev": 100.0})
    keys = ("data.root=hotpot", "data.corpus=corpus.jsonl", "data.train=train.jsonl", "data.dev=dev.jsonl")
    found = json.loads(run_command("data", "check", *keys, "--json").stdout)
    assert found["coverage"]["train"]["gold_found"] == 2


def test_a_fetch_from_nowhere_is_refused(refused: Any) -> None:
    assert "which is no folder" in refused("data", "fetch", "musique", "--from", "nowhere", "--out", "out")
