"""Scores by question beside the trajectories of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UserError
from pipeline.core.evaluation import evaluate
from pipeline.core.question_scores import METRICS, read_scores
from pipeline.core.record_tables import trajectories_from_table, trajectories_to_table
from pipeline.core.run import write_table
from tests.pipeline.scores_support import answered, questions, write_evaluation


def test_an_evaluation_keeps_what_its_scores_are_the_means_of(tmp_path: Path) -> None:
    asked = questions(4)
    scores = write_evaluation(tmp_path / "best.parquet", asked, "1h0.")
    trajectories = trajectories_from_table(pq.read_table(tmp_path / "best.parquet"))
    whole = evaluate(asked, trajectories, bootstrap_samples=0)
    for metric in METRICS:
        assert 100 * np.nanmean(scores.values[metric]) == pytest.approx(whole[metric]), metric
    assert scores.values["em"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert scores.values["f1"].tolist() == pytest.approx([1.0, 0.8, 0.0, 0.0])
    assert np.isnan(scores.values["gold_recall"]).tolist() == [True, False, False, False]
    assert (scores.protocol, list(scores.ids)) == ("exsearch", ["q0", "q1", "q2", "q3"])
    assert list(scores.hops) == [1, 2, 1, 2]
    assert list(scores.types) == ["bridge", "bridge", "", ""]
    assert list(scores.answers) == ["answer 0", "answer of 1", "nobody", ""]
    assert scores.asked["q1"] == ("Who is 1?", ("answer 1", "alias 1"))


def test_the_order_of_another_evaluation_is_that_of_every_column(tmp_path: Path) -> None:
    asked = questions(3)
    first = write_evaluation(tmp_path / "a.parquet", asked, "100")
    second = write_evaluation(tmp_path / "b.parquet", asked[::-1], "1h0")
    turned = second.in_order_of(first)
    assert (turned.ids, turned.answers) == (["q0", "q1", "q2"], ["nobody", "answer of 1", "answer 2"])
    assert turned.values["em"].tolist() == [0.0, 0.0, 1.0]
    assert turned.asked == first.asked


def test_what_an_earlier_version_wrote_has_no_scores_by_question(tmp_path: Path) -> None:
    (question,) = questions(1)
    write_table(tmp_path / "old.parquet", trajectories_to_table([answered(question, "answer 0")]))
    assert read_scores(tmp_path / "old.parquet") is None
    assert read_scores(tmp_path / "nothing.parquet") is None


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"best\.parquet is damaged"):
        read_scores(tmp_path / "best.parquet")
