"""What `exsearch evaluate` makes of trajectories; engines and searches are not needed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.commands.evaluate import scored
from pipeline.commands.predictions import evaluate_predictions
from pipeline.core.data.questions import read_questions
from pipeline.core.display import Display
from pipeline.methods import load
from tests.pipeline.core.scoring.test_support import TWO_STEPS

ROW = {
    "_id": "q",
    "question": "Who founded the maker of the Silver Harp?",
    "answer": "Mara Velin",
    "supporting_facts": [["Silver Harp", 1], ["Orvane", 1], ["Trel", 0]],
    "context": [
        ["Silver Harp", ["The Silver Harp is a harp.", " It is made by Orvane."]],
        ["Orvane", ["It is in Trel.", " Mara Velin founded it in 1950."]],
        ["Trel", ["A town."]],
    ],
}


def test_scores_trajectories_and_predictions_are_written_and_the_predictions_score_the_same(
    tmp_path: Path,
) -> None:
    gold, out = tmp_path / "dev.json", tmp_path / "scores.json"
    gold.write_text(json.dumps([ROW]))
    keys = ["evaluation.protocol=hotpotqa", "evaluation.bootstrap_samples=0"]
    sets = {"dev.json": read_questions([gold], with_evidence=True)}
    result = scored(load(None, keys), {"searcher": "m"}, "dev", sets, [TWO_STEPS], {}, out, Display())
    found = result["protocol"]["scores"]
    assert (found["em"], found["sp_em"], found["joint_em"]) == (100, 0, 0)
    assert (found["sp_prec"], found["sp_recall"]) == (100, pytest.approx(200 / 3))
    assert result["all"]["em"] == result["sets"]["dev.json"]["em"] == 100
    assert json.loads(out.read_text()) == result
    assert (tmp_path / "scores.parquet").is_file()
    predictions = tmp_path / "scores.predictions.json"
    assert json.loads(predictions.read_text()) == {
        "answer": {"q": "Mara Velin"},
        "sp": {"q": [["Orvane", 1], ["Silver Harp", 1]]},
    }
    again = evaluate_predictions(predictions, [gold], keys, of_a_model=(), out=None, display=Display())
    assert again["protocol"] == result["protocol"]
    assert again["all"]["em_interval"] == result["all"]["em_interval"]
