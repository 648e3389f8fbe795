"""The plan of an epoch, and the rows that come out of it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.core.packing import OptimizerStep, collate, plan_epoch
from pipeline.core.records import Example

BUDGET = 40
lengths_st = st.lists(st.integers(0, BUDGET), max_size=60)
batch_size_st = st.integers(1, 20)
world_size_st = st.integers(1, 5)
seed_st = st.integers(0, 2**31)


def plan(
    lengths: list[int],
    batch_size: int = 8,
    world_size: int = 2,
    seed: int = 0,
    units: list[str] | None = None,
) -> list[OptimizerStep]:
    """By default every example is a unit of its own."""
    return plan_epoch(
        lengths,
        batch_size=batch_size,
        world_size=world_size,
        token_budget=BUDGET,
        seed=(seed, 0),
        units=units or [f"q{i}" for i in range(len(lengths))],
    )


def packs_of(step: OptimizerStep) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(step.packs))


def example(token_ids: list[int], mask: list[int], unit: str = "q", **streams: Any) -> Example:
    return Example(
        "q",
        unit,
        "policy",
        np.array(token_ids, np.int32),
        np.array(mask, np.bool_),
        {name: np.array(values, np.float64) for name, values in streams.items()},
    )


@settings(deadline=None)
@given(lengths_st, batch_size_st, world_size_st, seed_st)
def test_every_example_is_in_one_step_and_in_one_pack_unless_it_needs_no_computing(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    steps = plan(lengths, batch_size, world_size, seed)
    assert sorted(chain.from_iterable(s.examples for s in steps)) == list(range(len(lengths)))
    for step in steps:
        assert len(step.examples) <= batch_size
        packed = sorted(chain.from_iterable(packs_of(step)))
        assert packed == sorted(i for i in step.examples if lengths[i] > 0)


@settings(deadline=None)
@given(lengths_st, batch_size_st, world_size_st, seed_st)
def test_no_pack_is_above_the_budget_and_ranks_run_equally_many(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    for step in plan(lengths, batch_size, world_size, seed):
        assert len(step.packs) == world_size
        assert len({len(packs) for packs in step.packs}) == 1
        assert step.packs[0]
        assert all(sum(lengths[i] for i in pack) <= BUDGET for pack in packs_of(step))


@settings(deadline=None)
@given(lengths_st, batch_size_st, seed_st)
def test_steps_have_the_same_examples_on_any_number_of_ranks(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    alone, shared = plan(lengths, batch_size, 1, seed), plan(lengths, batch_size, 4, seed)
    assert [s.examples for s in alone] == [s.examples for s in shared]
    assert plan(lengths, batch_size, 4, seed) == shared


def test_another_seed_gives_another_order() -> None:
    first, second = plan([5] * 40, seed=1), plan([5] * 40, seed=2)
    assert [s.examples for s in first] != [s.examples for s in second]


@settings(deadline=None)
@given(st.integers(1, 200), batch_size_st)
def test_steps_have_nearly_equally_many_examples(count: int, batch_size: int) -> None:
    sizes = [len(s.examples) for s in plan([1] * count, batch_size)]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_get_nearly_equally_many_tokens() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 20, size=64)]
    (step,) = plan(lengths, batch_size=64, world_size=4)
    loads = [sum(lengths[i] for i in chain.from_iterable(packs)) for packs in step.packs]
    assert max(loads) <= 1.05 * min(loads)


def test_one_example_for_two_ranks_leaves_one_rank_with_an_empty_pack() -> None:
    (step,) = plan([7], world_size=2)
    assert step.packs == (((0,),), ((),))


def test_an_example_longer_than_the_budget_is_named_with_the_key_to_raise() -> None:
    with pytest.raises(
        UserError, match=r"q7/3 has 41 tokens.*learner\.tokens_per_microbatch: 40.*at least 41"
    ):
        plan_epoch([3, 41], batch_size=2, world_size=1, token_budget=40, seed=(0,), units=["q1/0", "q7/3"])


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=25),
    batch_size_st,
    seed_st,
)
def test_units_of_merged_copies_are_in_the_steps_that_they_were_in_before(
    copies: list[list[int]], batch_size: int, seed: int
) -> None:
    def units_of_steps(counts: list[list[int]], copies: list[int] | None) -> list[list[str]]:
        units = [f"q{unit}" for unit, own in enumerate(counts) for _ in own]
        found = plan_epoch(
            [5] * len(units),
            batch_size=batch_size,
            world_size=2,
            token_budget=BUDGET,
            seed=(seed, 0),
            units=units,
            may_cut=(0,),
            copies=copies,
        )
        return [list(dict.fromkeys(units[i] for i in step.examples)) for step in found]

    apart = [[1] * sum(own) for own in copies]
    assert units_of_steps(copies, [c for own in copies for c in own]) == units_of_steps(apart, None)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, BUDGET)), min_size=1, max_size=60),
    batch_size_st,
    world_size_st,
    seed_st,
)
def test_a_pack_has_one_kind_and_every_step_its_share_of_each(
    examples: list[tuple[int, int]], batch_size: int, world_size: int, seed: int
) -> None:
    kinds = [kind for kind, _ in examples]
    steps = plan_epoch(
        [length for _, length in examples],
        batch_size=batch_size,
        world_size=world_size,
        token_budget=BUDGET,
        seed=(seed, 0),
        units=["q" for _ in examples] if not any(kinds) else [f"q{k}" for k in range(len(examples))],
        may_cut=(0, 1, 2),
        kinds=kinds,
    )
    assert sorted(i for step in steps for i in step.examples) == list(range(len(examples)))
    computed = sorted(i for step in steps for pack in packs_of(step) for i in pack)
    assert computed == [i for i, (_, length) in enumerate(examples) if length]
    for step in steps:
        assert {len(own) for own in step.packs} == {len(step.kinds)}
        for own in step.packs:
            for pack, kind in zip(own, step.kinds, strict=True):
                assert {kinds[i] for i in pack} <= {kind}
    if any(kinds):
        for kind in set(kinds):
            shares = [sum(kinds[i] == kind for i in step.examples) for step in steps]
            assert max(shares) - min(shares) <= 1


def test_units_of_one_name_and_two_kinds_are_two_units() -> None:
    (step,) = plan_epoch(
        [10, 10],
        batch_size=8,
        world_size=1,
        token_budget=15,
        seed=(0, 0),
        units=["q", "q"],
        kinds=[0, 1],
    )
    assert step.kinds == (0, 1) and step.packs == (((0,), (1,)),)


def test_nothing_to_train_on_is_an_empty_plan() -> None:
    assert plan([]) == []


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=4), min_size=1, max_size=25),
    batch_size_st,
    world_size_st,
    seed_st,
)
def test_a_unit_is_never_split(units: list[list[int]], batch_size: int, world_size: int, seed: int) -> None:
    lengths = [length for unit in units for length in unit]
    names = [f"u{number}" for number, unit in enumerate(units) for _ in unit]
    steps = plan(lengths, batch_size, world_size, seed, names)
    assert sorted(chain.from_iterable(s.examples for s in steps)) == list(range(len(lengths)))
    for holders in (
        [step.examples for step in steps],
        [pack for step in steps for pack in packs_of(step)],
    ):
        for name in set(names):
            holding = [h for h in holders if any(names[i] == name for i in h)]
            assert len(holding) <= 1
    assert all(sum(lengths[i] for i in pack) <= BUDGET for step in steps for pack in packs_of(step))


def test_targets_are_predicted_from_the_token_before_them_in_their_own_example() -> None:
    examples = [example([10, 11, 12], [0, 1, 1]), example([20, 21, 22, 23], [1, 0, 0, 1])]
    batch = collate((1, 0), examples, derived={"v": [0.5, 2.0]})
    assert batch.input_ids.tolist() == [[20, 21, 22, 23, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.segment_lengths == (4, 3)
    assert batch.targets.tolist() == [23, 11, 12]  # 20 is marked, but has nothing before it
    assert batch.predictors.tolist() == [2, 4, 5]
    assert batch.example_of_target.tolist() == [0, 1, 1]
    assert batch.numbers["v"].tolist() == [2.0, 0.5]
    assert [e.num_targets for e in examples] == [2, 1]


def test_streams_follow_their_targets_whatever_their_form() -> None:
    examples = [
        example([10, 11, 12], [0, 1, 1], "a", once=[3.0], token=[0.1, 0.2, 0.3], rows=[[1, 2], [3, 4]]),
        example([20, 21], [0, 1], "b", once=[5.0], token=[0.4, 0.5], rows=[[5, 6]]),
    ]
    batch = collate((1, 0), examples, ["once", "token", "rows"])
    assert batch.numbers["once"].tolist() == [5.0, 3.0]
    np.testing.assert_allclose(batch.streams["token"], [0.5, 0.2, 0.3])
    assert batch.streams["rows"].tolist() == [[5, 6], [1, 2], [3, 4]]
    assert batch.unit.tolist() == [0, 1]


def test_streams_that_nobody_asks_for_may_differ_between_examples() -> None:
    examples = [
        example([1, 2], [0, 1], log_weight=[1.0], advantage=[2.0]),
        example([3, 4], [0, 1], log_weight=[0.5]),
    ]
    batch = collate((0, 1), examples, ["log_weight"])
    assert {name: values.tolist() for name, values in batch.numbers.items()} == {"log_weight": [1.0, 0.5]}


@settings(deadline=None)
@given(st.data())
def test_a_packed_row_has_exactly_the_trained_tokens_of_its_examples(data: st.DataObject) -> None:
    masks = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=5))
    examples = [example(list(range(100 * k, 100 * k + len(m))), m) for k, m in enumerate(masks)]
    batch = collate(tuple(range(len(examples))), examples)
    expected = [int(t) for e in examples for t, m in zip(e.token_ids[1:], e.loss_mask[1:], strict=True) if m]
    assert batch.targets.tolist() == expected
    assert batch.input_ids[0][batch.predictors].tolist() == [t - 1 for t in expected]
    assert batch.example_of_target.tolist() == [t // 100 for t in expected]
    assert len(batch.targets) == sum(e.num_targets for e in examples)


def test_an_empty_pack_is_one_token_of_no_example() -> None:
    batch = collate((), [])
    assert batch.input_ids.shape == (1, 1)
    assert batch.segment_lengths == (1,)
    assert len(batch.unit) == 0
