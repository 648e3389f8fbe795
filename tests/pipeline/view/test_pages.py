"""What the viewer reads off a run: finished, going on, damaged, without its data."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from pipeline.core.agents.transcript import Transcript
from pipeline.core.errors import UserError
from pipeline.core.record_tables import trajectories_to_table
from pipeline.core.records import StopReason
from pipeline.core.run import write_table
from pipeline.core.weighting import effective_sample_size
from pipeline.view.details import PER_PAGE
from pipeline.view.pages import Pages
from pipeline.view.stored import NoSuchPage
from tests.pipeline.view_support import HOSTILE, TINY, Writer, asked


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
    rows = pages.page("rows/0/0001-rollouts/000000/0")["columns"]

    assert rows["id"] == ["q0/ä?#", "q1/ä?#"]
    assert rows["question"] == ["Who founded 0?", "Who founded 1?"]
    assert (rows["trajectories"], rows["em"], rows["searches"]) == ([2, 2], [0.5, 0.5], [1, 1])
    assert rows["gold_recall"] == [0.25, 0.25]  # one of two passages in one of two samples
    assert rows["stops"] == [{"answered": 2}] * 2
    assert rows["log_likelihood"] == pytest.approx([math.log((1 + math.exp(-2)) / 2)] * 2)
    assert rows["effective_samples"] == pytest.approx([effective_sample_size(np.array([0.0, -2.0]))] * 2)


def test_weights_of_zero_are_no_weights_and_nothing_fails(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", asked(2))
    writer.sampled(1, likelihoods=(None, None))
    writer.sampled(2, likelihoods=(-400.0, -400.0))
    pages = Pages([writer.path], live=True)

    nothing, little = (pages.page(f"rows/0/000{n}-rollouts/000000/0")["columns"] for n in (1, 2))
    assert (nothing["log_likelihood"], nothing["effective_samples"]) == ([None] * 2, [0] * 2)
    assert (little["log_likelihood"], little["effective_samples"]) == (
        pytest.approx([-400] * 2),
        pytest.approx([2] * 2),
    )
    (question, _) = pages.page("details/0/0001-rollouts/000000/0")["questions"]
    assert [(turn["weight"], turn["weight_share"]) for turn in question["turns"]] == [(0, None)] * 2
    (question, _) = pages.page("details/0/0002-rollouts/000000/0")["questions"]
    assert [turn["weight_share"] for turn in question["turns"]] == pytest.approx([0.5, 0.5])


def test_an_evaluation_has_a_line_per_question_without_weights(pages: Pages) -> None:
    rows = pages.page("rows/0/test-best/table/0")["columns"]

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
    assert ids == [question.id for question in writer.questions]
    part = found["ids/0/test-best/1/0"]["parts"]["table"]
    assert (part["ids"], part["places"]) == ([crc32(id_.encode()) for id_ in ids], list(range(number)))
    assert len(set(part["words"])) == number
    assert [(page["before"], page["after"]) for page in details] == [
        (None, ids[PER_PAGE]), (ids[PER_PAGE - 1], ids[2 * PER_PAGE]), (ids[2 * PER_PAGE - 1], None)
    ]  # fmt: skip
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
    found = pages.page("ids/0/0001-rollouts/1/0")["parts"]["loose-000000"]
    assert (found["ids"], found["places"]) == ([crc32(b"q4/\xc3\xa4?#"), crc32(b"q2/\xc3\xa4?#")], [0, 1])
    assert pages.page("rows/0/0001-rollouts/loose-000000/0")["columns"]["em"] == [0.5, 0.5]

    shutil.rmtree(tmp_path / "run/iterations/0001/rollouts/_loose")  # their shards are complete
    with pytest.raises(NoSuchPage, match="loose-000000"):
        pages.page("rows/0/0001-rollouts/loose-000000/0")


def test_a_shard_without_its_side_car_is_not_there_yet(writer: Writer, pages: Pages) -> None:
    (writer.path / "iterations/0001/rollouts/_000002.json").unlink()

    parts = pages.page("run/0")["sources"][0]["parts"]
    assert [part["name"] for part in parts] == ["000000", "000001"]


def test_without_its_files_of_questions_a_run_is_shown_all_the_same(
    writer: Writer, pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(writer.path.parent / "run-data")

    assert pages.page("rows/0/0001-rollouts/000000/0")["columns"]["em"] == [None, None]
    assert "are shown without gold passages" in caplog.text
    (first, _) = pages.page("details/0/0001-rollouts/000000/0")["questions"]
    assert (first["question"], first["prompt"]) == ("", "Question: Who founded 0?")
    rows = pages.page("rows/0/test-best/table/0")["columns"]  # evaluations hold their questions
    assert (rows["question"][0], rows["em"]) == ("Who founded 0?", [1, 0, 0, 0, 0])


def test_without_a_tokenizer_there_are_no_words_of_the_model_but_all_else(
    writer: Writer, tmp_path: Path
) -> None:
    config = writer.path / "config.yaml"
    config.write_text(config.read_text().replace("tiny-searcher", "gone"))
    (first, _) = Pages([writer.path], live=True).page("details/0/0001-rollouts/000000/0")["questions"]

    assert first["turns"][0]["segments"][1]["text"].endswith(" tokens")
    assert first["turns"][0]["steps"][0]["query"] == "Who founded it?"


def test_a_model_of_the_hub_has_its_words_from_the_cache(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = writer.path / "config.yaml"
    config.write_text(config.read_text().replace(str(TINY), "somebody/tiny"))
    cached = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(TINY, cached / "snapshots" / "1234", ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (first, _) = Pages([writer.path], live=True).page("details/0/0001-rollouts/000000/0")["questions"]

    assert first["turns"][0]["segments"][1]["text"].strip() == "<think> Who founded it? </think>"


@pytest.mark.parametrize(
    "name", ["", "run", "run/1", "run/-1", "run/x", "rows/0/none/0", "rows/0/test-best/x/0", "rows/0/test-best/table/1",
             "ids/0", "ids/0/test-best/0/0", "ids/0/test-best/2/2",
             "details/0/test-best/table/1", "details/0/test-best/table/-1", "../run/0", "runs/0"]
)  # fmt: skip
def test_a_page_that_is_none_is_told_by_name(pages: Pages, name: str) -> None:
    with pytest.raises(NoSuchPage):
        pages.page(name)


@pytest.mark.parametrize("content", [b"PAR1 not", b""])
def test_a_damaged_table_is_named_and_hides_nothing_else(
    writer: Writer, pages: Pages, content: bytes
) -> None:
    (writer.path / "test/best.parquet").write_bytes(content)

    parts = {one["key"]: one["parts"] for one in pages.page("run/0")["sources"]}
    assert parts["test-best"] == [{"name": "table", "rows": None}]
    for page in ("rows/0/test-best/table/0", "ids/0/test-best/1/0", "details/0/test-best/table/0"):
        with pytest.raises(UserError, match=r"test/best\.parquet is damaged"):
            pages.page(page)
    assert pages.page("rows/0/0001-rollouts/000000/0")["columns"]["em"] == [0.5, 0.5]


def test_a_damaged_side_car_is_named(writer: Writer, pages: Pages) -> None:
    side_car = writer.path / "iterations/0001/rollouts/_000000.json"
    side_car.write_text(side_car.read_text().replace("per_token", "per_tok"))
    with pytest.raises(UserError, match=r"rollouts/_000000\.json is damaged, or of another version"):
        pages.page("rows/0/0001-rollouts/000000/0")

    side_car.write_text("{")
    for page in ("rows/0/0001-rollouts/000000/0", "details/0/0001-rollouts/000000/0"):
        with pytest.raises(UserError, match=r"rollouts/_000000\.json is damaged"):
            pages.page(page)


def test_a_turn_without_tokens_is_shown_without_text(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", asked(1))
    writer.trajectory = lambda question, sample, **_: Transcript().trajectory(  # type: ignore[method-assign]
        question_id=question.id, sample=sample, role="selector", policy_version=0,
        stop_reason=StopReason.RETRIEVER_UNAVAILABLE, detail="down",
    )  # fmt: skip
    writer.evaluated("test/best", "0")

    (question,) = Pages([writer.path], live=True).page("details/0/test-best/table/0")["questions"]
    assert (question["turns"][0]["segments"], question["turns"][0]["stop_reason"]) == (
        [],
        "retriever_unavailable",
    )


def test_an_episode_of_several_roles_has_the_answer_of_its_last_turn(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", asked(1))
    (question,) = writer.questions
    selects = replace(writer.trajectory(question, 0, right=True), role="selector", answer="")
    answers = replace(writer.trajectory(question, 0, right=True), role="generator", steps=())
    broken = replace(selects, sample=1, stop_reason=StopReason.MALFORMED)
    table = trajectories_to_table([selects, answers, broken, replace(answers, sample=1, answer="nobody")])
    write_table(writer.path / "test/best.parquet", table)
    pages = Pages([writer.path], live=True)

    rows = pages.page("rows/0/test-best/table/0")["columns"]
    assert (rows["trajectories"], rows["em"], rows["searches"]) == ([2], [0.5], [1])
    assert rows["stops"] == [{"answered": 1, "malformed": 1}]
    (found,) = pages.page("details/0/test-best/table/0")["questions"]
    assert [(turn["role"], turn["em"]) for turn in found["turns"]] == [
        ("selector", None), ("generator", 1), ("selector", 0), ("generator", 0)
    ]  # fmt: skip

    unanswered = [replace(turn, answer="") for turn in (selects, answers)]
    write_table(writer.path / "test/best.parquet", trajectories_to_table(unanswered))
    assert pages.page("rows/0/test-best/table/0")["columns"]["em"] == [None]


def test_passages_without_ids_have_no_recall(writer: Writer, pages: Pages) -> None:
    bare = replace(writer.questions[0], supporting_ids=("",))
    turns = [writer.trajectory(bare, 0, right=True)]
    write_table(writer.path / "test/best.parquet", trajectories_to_table(turns))

    assert pages.page("rows/0/test-best/table/0")["columns"]["gold_recall"] == [None]


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
