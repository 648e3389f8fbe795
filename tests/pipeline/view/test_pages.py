"""What the viewer reads off a run: finished, going on, damaged, without its data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.view.details import PER_PAGE
from pipeline.view.pages import NoSuchPage, Pages
from tests.pipeline.view_support import HOSTILE, Writer, asked


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """Five questions, two samples of each in three shards; a dev evaluation and a test."""
    made = Writer(tmp_path / "run", asked(5))
    made.sampled(1)
    made.evaluated("iterations/0001/evaluation", "11010")
    made.evaluated("test/best", "10000")
    return made


@pytest.fixture
def pages(writer: Writer) -> Pages:
    return Pages([writer.path], live=True)


def test_a_run_tells_how_it_stands_and_what_can_be_looked_at(pages: Pages) -> None:
    run = pages.page("run/0")

    assert run["status"]["state"] == "unknown"
    assert "iterations: 2" in run["config"]
    assert [(one["key"], one["kind"], one["finished"]) for one in run["sources"]] == [
        ("0001-rollouts", "samples", True),
        ("0001-evaluation", "dev", True),
        ("test-best", "test", True),
    ]
    assert run["sources"][0]["parts"] == [
        {"name": "000000", "rows": 4},
        {"name": "000001", "rows": 4},
        {"name": "000002", "rows": 2},
    ]


def test_a_line_per_question_has_the_figures_of_its_samples(pages: Pages) -> None:
    rows = pages.page("rows/0/0001-rollouts/000000")

    assert rows["id"] == ["q0/ä?#", "q1/ä?#"]
    assert rows["question"] == ["Who founded 0?", "Who founded 1?"]
    assert (rows["trajectories"], rows["em"], rows["searches"]) == ([2, 2], [0.5, 0.5], [1, 1])
    assert rows["gold_recall"] == [0.25, 0.25]  # one of two passages in one of two samples
    assert rows["stops"] == [{"answered": 2}] * 2
    assert rows["log_likelihood"] == pytest.approx([math.log((1 + math.exp(-2)) / 2)] * 2)
    weights = (1, math.exp(-2))
    assert rows["effective_samples"] == pytest.approx([sum(weights) ** 2 / (1 + math.exp(-4))] * 2)


def test_an_evaluation_has_a_line_per_question_without_weights(pages: Pages) -> None:
    rows = pages.page("rows/0/test-best/table")

    assert (rows["em"], rows["gold_recall"]) == ([1, 0, 0, 0, 0], [0.5, 0, 0, 0, 0])
    assert rows["effective_samples"] == [None] * 5


def test_a_trajectory_is_text_that_says_who_wrote_it_and_what_is_trained(pages: Pages) -> None:
    (first, _) = pages.page("details/0/0001-rollouts/000000/0")["questions"]
    right, wrong = first["turns"]

    assert [(s["by"], s["trained"], s["text"].strip()) for s in right["segments"]] == [
        ("environment", False, "Question: Who founded 0?"),
        ("model", True, "<think> Who founded it? </think>"),
        ("environment", False, "<search>\n[1] Maker\n</search>"),
        ("model", False, "<answer> Ada 0 </answer>"),
    ]
    assert right["segments"][1]["logprob"] == -0.5 * right["segments"][1]["tokens"]
    assert sum(segment["tokens"] for segment in right["segments"]) == right["tokens"]
    assert (right["em"], wrong["em"], right["answer"]) == (1, 0, "Ada 0")
    (hit,) = right["steps"][0]["hits"]
    assert (hit["id"], hit["gold"], hit["score"], hit["text"]) == ("gold0", True, 0.75, HOSTILE)
    assert wrong["steps"][0]["hits"][0]["gold"] is False


def test_a_trajectory_has_its_weight_and_what_the_loss_is_told(pages: Pages) -> None:
    (first, _) = pages.page("details/0/0001-rollouts/000000/0")["questions"]

    assert [turn["log_likelihood"] for turn in first["turns"]] == [0, -2]
    shares = [turn["weight_share"] for turn in first["turns"]]
    assert (sum(shares), shares[0] / shares[1]) == (pytest.approx(1), pytest.approx(math.exp(2)))
    assert [(e["id"], e["policy"], e["unit"], e["numbers"]) for e in first["examples"]] == [
        ("q0/ä?#/0", "searcher", "q0/ä?#", {"log_weight": 0}),
        ("q0/ä?#/1", "searcher", "q0/ä?#", {"log_weight": -2}),
    ]


def test_every_page_that_is_named_is_there_and_holds_every_question_once(tmp_path: Path) -> None:
    number = 2 * PER_PAGE + 1
    writer = Writer(tmp_path / "run", asked(number))
    writer.evaluated("test/best", "1" * number)
    pages = Pages([writer.path], live=False)
    found = {name: pages.page(name) for name in pages.names()}

    details = [page for name, page in found.items() if name.startswith("details/")]
    assert [len(page["questions"]) for page in details] == [PER_PAGE, PER_PAGE, 1]
    ids = [question["id"] for page in details for question in page["questions"]]
    assert ids == [question.id for question in writer.questions] == found["ids/0/test-best"]["parts"]["table"]
    json.dumps(found, allow_nan=False)


def test_a_sampling_that_goes_on_shows_what_is_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", asked(5))
    writer.sampled(1, shards=1, loose=[4, 2])
    pages = Pages([writer.path], live=True)

    (source,) = pages.page("run/0")["sources"]
    assert (source["finished"], [part["name"] for part in source["parts"]]) == (
        False,
        ["000000", "loose-000000"],
    )
    assert pages.page("ids/0/0001-rollouts")["parts"]["loose-000000"] == ["q4/ä?#", "q2/ä?#"]
    assert pages.page("rows/0/0001-rollouts/loose-000000")["em"] == [0.5, 0.5]

    shutil.rmtree(tmp_path / "run/iterations/0001/rollouts/_loose")  # their shards are complete
    with pytest.raises(NoSuchPage, match="loose-000000"):
        pages.page("rows/0/0001-rollouts/loose-000000")


def test_a_shard_without_its_side_car_is_not_there_yet(writer: Writer, pages: Pages) -> None:
    (writer.path / "iterations/0001/rollouts/_000002.json").unlink()

    parts = pages.page("run/0")["sources"][0]["parts"]
    assert [part["name"] for part in parts] == ["000000", "000001"]


def test_without_its_files_of_questions_a_run_is_shown_all_the_same(
    writer: Writer, pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(writer.path.parent / "run-data")

    assert pages.page("rows/0/0001-rollouts/000000")["em"] == [None, None]
    assert "are shown without gold passages" in caplog.text
    (first, _) = pages.page("details/0/0001-rollouts/000000/0")["questions"]
    assert first["question"] == "Question: Who founded 0?"  # out of the prompt
    rows = pages.page("rows/0/test-best/table")  # evaluations hold their questions
    assert (rows["question"][0], rows["em"]) == ("Who founded 0?", [1, 0, 0, 0, 0])


def test_without_a_tokenizer_there_are_no_words_of_the_model_but_all_else(
    writer: Writer, tmp_path: Path
) -> None:
    config = writer.path / "config.yaml"
    config.write_text(config.read_text().replace("tiny-searcher", "gone"))
    (first, _) = Pages([writer.path], live=True).page("details/0/0001-rollouts/000000/0")["questions"]

    assert first["turns"][0]["segments"][1]["text"].endswith(" tokens")
    assert first["turns"][0]["steps"][0]["query"] == "Who founded it?"


@pytest.mark.parametrize(
    "name", ["", "run", "run/1", "run/-1", "run/x", "rows/0/none/0", "rows/0/test-best/x", "ids/0",
             "details/0/test-best/table/1", "details/0/test-best/table/-1", "../run/0", "runs/0"]
)  # fmt: skip
def test_a_page_that_is_none_is_told_by_name(pages: Pages, name: str) -> None:
    with pytest.raises(NoSuchPage):
        pages.page(name)


def test_a_damaged_file_is_named(writer: Writer, pages: Pages) -> None:
    (writer.path / "test/best.parquet").write_bytes(b"PAR1 not")

    with pytest.raises(UserError, match="run/0: a file of the run is damaged"):
        pages.page("run/0")


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    for name in ("a/seed-0", "b/seed-0", "b/seed-1"):
        Writer(tmp_path / name, asked(1))
    pages = Pages([tmp_path / name for name in ("a/seed-0", "b/seed-0", "b/seed-1")], live=True)

    assert [run["name"] for run in pages.page("runs")["runs"]] == ["a/seed-0", "b/seed-0", "b/seed-1"]
    assert [run["name"] for run in Pages([tmp_path / "b/seed-1"], live=True).page("runs")["runs"]] == [
        "seed-1"
    ]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
        Pages([tmp_path], live=True)
