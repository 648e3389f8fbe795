"""The three splits of a run, refused or complete before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.data.splits import Splits, load_splits
from pipeline.core.errors import UserError


def write(path: Path, *ids: str) -> None:
    rows = [{"id": id_, "question": f"Question {id_}?", "answers": [f"answer {id_}"]} for id_ in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", *(f"t{i}" for i in range(20)))
    write(tmp_path / "more.jsonl", *(f"m{i}" for i in range(20)))
    write(tmp_path / "dev.jsonl", *(f"d{i}" for i in range(10)))
    write(tmp_path / "test.jsonl", *(f"x{i}" for i in range(10)))
    return tmp_path


def load(root: Path, *overrides: str) -> Splits:
    config = load_config(None, [f"data.root={root}", *overrides])
    return load_splits(config.data, config.seed, required=("train", "dev") if config.em.iterations else ())


TRAIN_AND_DEV = ("data.train=train.jsonl", "data.dev=dev.jsonl")


def test_splits_are_read_below_the_root(root: Path) -> None:
    splits = load(root, "data.train=[train.jsonl, more.jsonl]", "data.dev=dev.jsonl", "data.test=test.jsonl")
    assert [len(s) for s in (splits.train, splits.dev, splits.test)] == [40, 10, 10]
    assert splits.train[0].id == "t0"


def test_test_questions_are_optional(root: Path) -> None:
    assert load(root, *TRAIN_AND_DEV).test == []


@pytest.mark.parametrize(
    ("given", "missing"),
    [((), "data.train"), (("data.train=train.jsonl",), "data.dev"), (("data.dev=dev.jsonl",), "data.train")],
)
def test_training_without_training_or_dev_questions_is_refused(
    root: Path, given: tuple[str, ...], missing: str
) -> None:
    with pytest.raises(UserError, match=f"{missing} is empty"):
        load(root, *given)


def test_a_cold_start_needs_no_dev_questions(root: Path) -> None:
    config = load_config(None, [f"data.root={root}", "data.train=train.jsonl"])
    assert load_splits(config.data, 0, required=("train",)).dev == []


def test_without_iterations_every_split_may_be_empty(root: Path) -> None:
    assert load(root, "em.iterations=0") == Splits([], [], [])


def test_limits_take_a_sample_that_depends_on_the_seed_alone(root: Path) -> None:
    limits = ("data.train_limit=5", "data.dev_limit=3", "data.test=test.jsonl", "data.test_limit=2")
    splits = load(root, *TRAIN_AND_DEV, *limits)
    assert [len(s) for s in (splits.train, splits.dev, splits.test)] == [5, 3, 2]
    assert load(root, *TRAIN_AND_DEV, *limits) == splits
    assert load(root, *TRAIN_AND_DEV, *limits, "seed=1") != splits


def test_a_data_seed_chooses_the_sample_whatever_the_seed_of_the_run(root: Path) -> None:
    limits = ("data.train_limit=5", "data.dev_limit=3", "data.test=test.jsonl", "data.test_limit=2")
    splits = load(root, *TRAIN_AND_DEV, *limits, "data.seed=1")
    assert load(root, *TRAIN_AND_DEV, *limits, "data.seed=1", "seed=7") == splits
    assert load(root, *TRAIN_AND_DEV, *limits, "seed=1") == splits  # null is the seed of the run
    assert load(root, *TRAIN_AND_DEV, *limits, "data.seed=0", "seed=1") == load(root, *TRAIN_AND_DEV, *limits)
    assert load(root, *TRAIN_AND_DEV, *limits, "data.seed=2") != splits


def test_a_limit_above_the_number_of_questions_takes_all(root: Path) -> None:
    assert len(load(root, *TRAIN_AND_DEV, "data.train_limit=500").train) == 20


@pytest.mark.parametrize("split", ["dev", "test"])
def test_questions_that_are_trained_on_are_not_measured_on(root: Path, split: str) -> None:
    write(root / "leak.jsonl", "z0", "t3", "t1")
    with pytest.raises(UserError, match=rf"2 questions of data\.{split} are also in data\.train \(t1, t3\)"):
        load(root, *TRAIN_AND_DEV, f"data.{split}=leak.jsonl")


def test_a_missing_file_is_named_with_what_is_there(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"no question file .*trian\.jsonl; there are dev\.jsonl, more\.jsonl"
    ):
        load(root, "data.train=trian.jsonl", "data.dev=dev.jsonl")


def test_only_questions_of_the_wanted_hops_are_taken(root: Path) -> None:
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"hops": 1 + number % 2}) + "\n" for number, row in enumerate(rows)]
    (root / "train.jsonl").write_text("".join(lines))
    config = load_config(None, [f"data.root={root}", "data.train=train.jsonl", "data.hops=[2]"])
    assert [q.hops for q in load_splits(config.data, 0).train] == [2] * 10
    with pytest.raises(
        UserError, match=r"data\.hops is \[2\], but no question of dev\.jsonl names so many hops"
    ):
        load(root, *TRAIN_AND_DEV, "data.hops=[2]")


def test_training_questions_may_have_other_hops_than_those_that_are_asked(root: Path) -> None:
    for name in ("train", "dev"):
        rows = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"hops": 1 + number % 3}) + "\n" for number, row in enumerate(rows)]
        (root / f"{name}.jsonl").write_text("".join(lines))

    splits = load(root, *TRAIN_AND_DEV, "data.train_hops=[1,2]")

    assert {q.hops for q in splits.train} == {1, 2}
    assert {q.hops for q in splits.dev} == {1, 2, 3}


def test_answers_that_are_not_scored_are_said_once_with_their_number(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"id": "z", "question": "Who?", "answers": ["a", "b", "c"]}
    (root / "aliases.jsonl").write_text(json.dumps(row) + "\n")
    with caplog.at_level("INFO"):
        splits = load(
            root, "data.train=[train.jsonl, aliases.jsonl]", "data.dev=dev.jsonl", "data.max_answers=1"
        )
    assert splits.train[-1].distinct_answers == ("a",)
    assert [r.getMessage() for r in caplog.records] == [
        "data.max_answers is 1: 2 further answers of 1 training questions are accepted as right, but their likelihood "
        "is not scored"
    ]
