"""`exsearch evaluate --predictions`: files in the sets' own formats, from the rows' own files to the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.core.scoring import restated_sets as restated
from tests.pipeline.core.scoring.generated import (
    ALIASES,
    Chance,
    hotpotqa_files,
    kilt_files,
    musique_files,
    two_wiki_files,
)

SEEDS = range(5)


def scored(run_command: Any, protocol: str, gold: Path, predictions: Path) -> dict[str, Any]:
    result = run_command(
        "evaluate", "--protocol", protocol, "--predictions", predictions, "--gold", gold, "--json"
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", SEEDS)
def test_hotpotqas_own_file(run_command: Any, folder: Path, seed: int) -> None:
    rows, prediction = hotpotqa_files(Chance(seed))
    gold = folder / "hotpot_dev_distractor_v1.json"
    gold.write_text(
        json.dumps([{**row, "question": "Who?", "type": "bridge", "context": []} for row in rows])
    )
    found = scored(run_command, "hotpotqa", gold, lines(folder / "pred.json", [prediction]))
    assert found["protocol"]["scores"] == pytest.approx(restated.hotpotqa(rows, prediction))
    assert found["all"]["em"] == pytest.approx(found["protocol"]["scores"]["em"])
    assert found["all"]["by_type"]["bridge"]["n"] == len(rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_2wikimultihopqas_own_files_as_fetched(run_command: Any, folder: Path, seed: int) -> None:
    rows, prediction = two_wiki_files(Chance(seed))
    theirs = folder / "theirs"
    theirs.mkdir()
    records = [{**row, "question": "Who?", "type": "comparison", "context": []} for row in rows]
    (theirs / "dev.json").write_text(json.dumps(records))
    names = [{"Q_id": id_, "aliases": others, "demonyms": []} for id_, others in ALIASES.items()]
    lines(theirs / "id_aliases.json", names)
    result = run_command("data", "fetch", "2wikimultihopqa", "--from", theirs, "--out", folder / "ours")
    assert result.exit_code == 0, result.output
    predictions = lines(folder / "pred.json", [prediction])
    found = scored(run_command, "2wikimultihopqa", folder / "ours/dev.jsonl", predictions)
    assert found["protocol"]["scores"] == pytest.approx(restated.two_wiki(rows, prediction, ALIASES))


@pytest.mark.parametrize("seed", SEEDS)
def test_musiques_own_file(run_command: Any, folder: Path, seed: int) -> None:
    rows, predicted = musique_files(Chance(seed))
    gold = [
        {
            **row,
            "question": "Who?",
            "paragraphs": [{**p, "title": "T", "paragraph_text": "Text."} for p in row["paragraphs"]],
        }
        for row in rows
    ]
    predictions = lines(folder / "pred.jsonl", predicted)
    found = scored(run_command, "musique", lines(folder / "musique_ans_v1.0_dev.jsonl", gold), predictions)
    assert found["protocol"]["scores"] == pytest.approx(restated.musique(rows, predicted))


@pytest.mark.parametrize("seed", SEEDS)
def test_kilts_own_file(run_command: Any, folder: Path, seed: int) -> None:
    rows, guesses = kilt_files(Chance(seed))
    gold = lines(folder / "nq-dev-kilt.jsonl", [{**row, "input": "Who?"} for row in rows])
    found = scored(run_command, "kilt", gold, lines(folder / "guess.jsonl", guesses))
    assert found["protocol"]["scores"] == pytest.approx(restated.kilt(rows, guesses))


def test_the_scores_are_shown_and_kept(run_command: Any, folder: Path) -> None:
    (folder / "pred.json").write_text(json.dumps({"dev0": "Ada", "dev1": "nobody"}))
    result = run_command(
        "evaluate", "--predictions", "pred.json", "--gold", "dev.jsonl", "--out", "scores.json"
    )
    assert result.exit_code == 0, result.output
    kept = json.loads((folder / "scores.json").read_text())
    assert (kept["protocol"]["protocol"], kept["all"]["n"], kept["protocol"]["predicted"]) == (
        "exsearch",
        3,
        2,
    )


def test_what_the_official_script_looks_at_and_the_rows_lack_is_said(run_command: Any, folder: Path) -> None:
    (folder / "pred.json").write_text(json.dumps({"answer": {"dev0": "Ada"}, "sp": {"dev0": []}}))
    result = run_command(
        *("evaluate", "--protocol", "hotpotqa", "--predictions", "pred.json", "--gold", "dev.jsonl", "--json")
    )
    assert "hotpotqa: no question has supporting_facts" in result.stderr
    assert "sp_em" not in json.loads(result.stdout)["protocol"]["scores"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predictions", "pred.json"), "--predictions FILE and --gold FILE go together"),
        (("--gold", "dev.jsonl"), "--predictions FILE and --gold FILE go together"),
        (
            ("--predictions", "p", "--gold", "dev.jsonl", "--model", "model"),
            "leave out --config, --run and --model",
        ),
        (("--predictions", "nothing.json", "--gold", "dev.jsonl"), "no file of predictions nothing.json"),
        (("--predictions", "config.yaml", "--gold", "dev.jsonl"), "config.yaml: not a JSON object"),
        (("--predictions", "p", "--gold", "dev.jsonl", "--protocol", "hotpot"), "evaluation.protocol"),
    ],
)
def test_predictions_that_cannot_be_scored(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("evaluate", *arguments)
