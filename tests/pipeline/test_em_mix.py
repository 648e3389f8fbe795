"""The cold-start examples that are mixed into an M-step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.core.example_files import read_examples
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Example
from pipeline.core.run import write_table
from pipeline.em import ExpectationMaximisation


class Folder:
    """The part of a run that mixing asks for."""

    def __init__(self, path: Path, credit: str = "trajectory") -> None:
        self.path = path
        self.config = SimpleNamespace(
            seed=3, cold_start=SimpleNamespace(mix=0.5), weighting=SimpleNamespace(credit=credit)
        )

    def shards(self, t: int, name: str) -> list[Path]:
        return sorted((self.path / str(t) / name).glob("*.parquet"))

    def fresh(self, step: str) -> Path:
        return self.path / step


def example(name: str, targets: int, weight: float) -> Example:
    ids = np.arange(targets + 2, dtype=np.int32)
    return Example(name, name, "searcher", ids, ids >= 2, {"log_weight": np.log([weight])})


def test_half_as_many_cold_start_examples_have_the_average_weight_of_a_token_and_are_the_same_again(
    tmp_path: Path,
) -> None:
    # No mean over examples, nor weight 1, is the average over tokens: (0.4 + 3 e-9 + 0.2 + 0.6) / 8.
    weighted = [
        example("q0/0", 1, 0.4),
        example("q0/1", 3, 1e-9),
        example("q1/0", 2, 0.1),
        example("q1/1", 2, 0.3),
    ]
    for number in (0, 2):
        shard = tmp_path / f"1/searcher/{number}.parquet"
        write_table(shard, examples_to_table(weighted[number : number + 2]))
    write_table(
        tmp_path / "0/searcher/0.parquet", examples_to_table([example("c0", 5, 1.0), example("c1", 6, 1.0)])
    )
    run: Any = Folder(tmp_path)
    mixing, shards = ExpectationMaximisation(run, cold_start=None), run.shards(1, "searcher")

    path = mixing.mixed_in(1, shards)

    mixed, written = read_examples(path), path.read_bytes()
    assert [one.id for one in mixed] == ["mix/0", "mix/1"]
    assert {one.num_targets for one in mixed} <= {5, 6}
    assert np.exp([one.number("log_weight") for one in mixed]) == pytest.approx([0.15] * 2)
    # A training that goes on knows its examples by the bytes of their shards.
    assert mixing.mixed_in(1, shards).read_bytes() == written


def test_copies_count_as_the_examples_that_they_are_and_every_token_of_a_mixed_one_weighs_the_same(
    tmp_path: Path,
) -> None:
    merged = example("q0/0", 2, 0.6)
    merged = replace(merged, streams=dict(merged.streams) | {"copies": np.array([3.0])})
    for name, one in (("1/searcher/0", merged), ("0/searcher/0", example("c0", 5, 1.0))):
        write_table(tmp_path / f"{name}.parquet", examples_to_table([one]))
    run: Any = Folder(tmp_path, credit="turn")
    mixed = read_examples(
        ExpectationMaximisation(run, cold_start=None).mixed_in(1, run.shards(1, "searcher"))
    )
    assert len(mixed) == 2  # half of 3, rounded to even
    assert np.exp([one.number("log_weight") for one in mixed]) == pytest.approx([0.2] * 2)
    assert [one.streams["credit"].tolist() for one in mixed] == [[1.0]] * 2
