"""Which latent tasks an input trains, and that all of them together are the mean that is served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.latent_tasks import (
    gates_between,
    gates_from_table,
    gates_of,
    gates_to_table,
    keys_between,
    mixtures,
    most_gates,
    streams_of,
)
from pipeline.core.packing import collate
from pipeline.core.records import Episode, Example, Numbers, Question
from pipeline.core.run import write_records
from pipeline.core.weighing import Weighted, WithStreams


def vectors(count: int, seed: int, around: float = 1.0) -> Numbers:
    """Of length 1, on one side of the origin, as those of sentences are."""
    found = around + np.random.default_rng(seed).normal(size=(count, 6))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


counts = st.integers(1, 12)


@settings(deadline=None)
@given(counts, counts, st.integers(2, 9), st.integers(0, 99))
def test_the_mean_of_the_gates_is_what_is_served_over_old_and_new_half_each(
    num_old: int, num_new: int, tasks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    of_old, of_new = gates_between(vectors(num_old, seed), vectors(num_new, seed + 1), tasks, 2, rng)
    assert of_old.shape == (num_old, tasks) and of_new.shape == (num_new, tasks)
    mean = (of_old.mean(axis=0) + of_new.mean(axis=0)) / 2
    # Those near to nobody stay shut, and their increments nothing.
    assert all(value == 0 or value == pytest.approx(1) for value in mean.tolist())
    assert (np.concatenate([of_old, of_new]) > 0).sum(axis=1).min() >= 1
    assert (np.concatenate([of_old, of_new]) > 0).sum(axis=1).max() <= 2


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), st.integers(1, 9), st.integers(0, 99))
def test_an_input_has_its_nearest_tasks_in_proportion_to_the_cosine(
    inputs: int, tasks: int, nearest: int, seed: int
) -> None:
    given_inputs, keys = 3 * vectors(inputs, seed), vectors(tasks, seed + 1)
    found = mixtures(given_inputs, keys, min(nearest, tasks))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    for own, row in zip(given_inputs, found, strict=True):
        cosines = [float(own @ key / np.linalg.norm(own)) for key in keys]
        best = sorted(cosines)[-min(nearest, tasks) :]
        total = sum(max(cosine, 1e-6) for cosine in best)
        expected = [max(c, 1e-6) / total if c >= best[0] else 0.0 for c in cosines]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_an_input_that_points_away_from_all_keys_has_its_nearest_alike() -> None:
    found = mixtures(-np.eye(6)[:1], np.abs(vectors(4, 0)), 2)
    assert sorted(found[0].tolist()) == [0, 0, 0.5, 0.5]


def test_every_key_lies_between_an_old_input_and_a_new_one() -> None:
    old, new = np.eye(6)[:2], np.eye(6)[3:]
    keys = keys_between(old, new, 12, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1)
    for key in keys:
        assert sorted(np.flatnonzero(key) < 3) == [False, True]  # one of each
    # In turns: six keys of each old input, four of each new one.
    assert (keys > 0).sum(axis=0).tolist() == [6, 6, 0, 4, 4, 4]


def test_old_and_new_inputs_near_a_key_train_the_same_task() -> None:
    """The increments are what new tasks and flashbacks share."""
    old, new = vectors(8, 1, around=2.0), vectors(8, 2, around=2.0)
    of_old, of_new = gates_between(old, new, 4, 2, np.random.default_rng(0))
    assert (of_old.any(axis=0) & of_new.any(axis=0)).sum() >= 2
    again, _ = gates_between(old, new, 4, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(of_old, again)


def test_inputs_without_length_have_gates_all_the_same() -> None:
    of_old, _ = gates_between(np.zeros((1, 3)), np.eye(3), 2, 1, np.random.default_rng(0))
    assert np.isfinite(of_old).all()


def test_gates_stand_in_the_streams_of_an_example_and_on_disk(tmp_path: Any) -> None:
    gates = np.array([0.0, 1.5, 0.0, 0.25])
    streams = streams_of(gates)
    assert len(streams) == 2
    assert gates_of(streams, 4).tolist() == gates.tolist()
    assert gates_of({}, 4).tolist() == [0, 0, 0, 0]
    assert (most_gates(streams), most_gates(["log_weight"])) == (4, 0)
    write_records(tmp_path / "gates.parquet", gates_to_table(["a", "b"], np.stack([gates, 2 * gates])))
    found = gates_from_table(pq.read_table(tmp_path / "gates.parquet"))
    assert {name: own.tolist() for name, own in found.items()} == {
        "a": gates.tolist(),
        "b": (2 * gates).tolist(),
    }


class OneExample:
    outputs = ("searcher",)

    def __call__(self, task: Question, episodes: Any) -> Weighted:
        return Weighted({"searcher": [Example.supervised(task.id, "searcher", [1], [2])]}, {"n": 1})

    def summarise(self, statistics: Any) -> Any:
        return {"n": sum(row["n"] for row in statistics)}


def test_examples_get_the_streams_of_their_question_beside_their_own() -> None:
    weigh = WithStreams(OneExample(), {"a": streams_of(np.array([0.0, 2.0])), "b": {}})
    episodes: list[Episode] = []
    (of_a,) = weigh(Question("a", "A?", ("x",)), episodes).examples["searcher"]
    (of_b,) = weigh(Question("b", "B?", ("x",)), episodes).examples["searcher"]
    assert {name: values.tolist() for name, values in of_a.streams.items()} == {
        "log_weight": [0.0],
        "gate/1": [2.0],
    }
    assert list(of_b.streams) == ["log_weight"]
    assert (weigh.outputs, weigh.summarise([{"n": 1}, {"n": 2}])) == (("searcher",), {"n": 3})


# ---------------------------------------------------------------- in a packed row


def gated(name: str, ids: list[int], gates: list[float]) -> Example:
    return Example(
        name,
        name[0],
        "searcher",
        np.array(ids, np.int32),
        np.array([False] + [True] * (len(ids) - 1)),
        streams_of(np.array(gates)),
    )


def test_every_token_of_a_row_has_the_gates_of_its_example() -> None:
    examples = [gated("a", [1, 2, 3], [1.0, 0.0]), gated("b", [4, 5], [0.5, 2.0]), gated("c", [6], [0, 0])]
    batch = collate((1, 0, 2), examples, latent_tasks=2)
    assert batch.gates.tolist() == [[0.5, 2], [0.5, 2], [1, 0], [1, 0], [1, 0], [0, 0]]
    assert collate((), [], latent_tasks=2).gates.tolist() == [[0, 0]]


def test_what_examples_begin_with_in_common_is_computed_once_where_their_gates_are_the_same() -> None:
    """Of other gates a token has other activations."""
    examples = [
        gated("a/0", [1, 2, 3], [1.0, 0.0]),
        gated("b/0", [1, 2, 4], [0.5, 2.0]),
        gated("a/1", [1, 2, 5], [1.0, 0.0]),
    ]
    batch = collate((0, 1, 2), examples, share_prefixes=True, latent_tasks=2)
    assert sorted(batch.input_ids[0].tolist()) == [1, 1, 2, 2, 3, 4, 5]
    for token, gates in zip(batch.input_ids[0].tolist(), batch.gates.tolist(), strict=True):
        if token in (3, 5, 4):
            assert gates == ([0.5, 2] if token == 4 else [1, 0])
    assert [own.tolist() for own in batch.gates].count([0.5, 2]) == 3
