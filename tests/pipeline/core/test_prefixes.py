"""The tree of what sequences begin with in common."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.packing import SHARED_COST, collate, plan_epoch
from pipeline.core.prefixes import Overlap, Runs, common_prefix, overlaps_of, prefix_tree
from pipeline.core.records import Example, TokenIds

ids_st = st.lists(st.integers(0, 2), min_size=1, max_size=7)
"""Of few different ids: many begin alike, some are the same, some go on from others."""
many_st = st.lists(ids_st, min_size=1, max_size=8)


def arrays(sequences: list[list[int]]) -> list[TokenIds]:
    return [np.array(ids, np.int32) for ids in sequences]


def numbers(runs: Runs) -> list[int]:
    return [number for start, end in runs for number in range(start, end)]


def beginnings(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}


@settings(deadline=None)
@given(many_st)
def test_every_beginning_is_one_row_and_every_sequence_a_path(sequences: list[list[int]]) -> None:
    tree = prefix_tree(arrays(sequences))
    assert len(tree.token_ids) == len(beginnings(sequences))
    for ids, path in zip(sequences, tree.paths, strict=True):
        assert tree.token_ids[path].tolist() == ids
        assert tree.position_ids[path].tolist() == list(range(len(ids)))


@settings(deadline=None)
@given(many_st)
def test_attention_sees_each_different_sequence_whole_and_gives_every_row_its_own_back(
    sequences: list[list[int]],
) -> None:
    tree = prefix_tree(arrays(sequences))
    runs = numbers(tree.branches.runs) if tree.branches else list(range(len(tree.token_ids)))
    along = tree.token_ids[runs].tolist()
    branches = [along[end - n : end] for n, end in zip(tree.lengths, np.cumsum(tree.lengths), strict=True)]
    whole = {
        tuple(ids)
        for ids in sequences
        if not any(len(ids) < len(o) and o[: len(ids)] == ids for o in sequences)
    }
    assert sorted(map(tuple, branches)) == sorted(whole)
    if tree.branches:
        assert [runs[place] for place in numbers(tree.branches.places)] == list(range(len(tree.token_ids)))


def test_ids_sort_as_numbers_and_not_as_bytes() -> None:
    tree = prefix_tree(arrays([[1, 300], [1, 2], [256], [1, 300, 7]]))
    assert tree.token_ids.tolist() == [1, 2, 300, 7, 256]
    assert tree.lengths == (2, 3, 1)


def test_overlaps_are_those_with_the_next_of_the_same_unit_in_the_order_of_the_tokens() -> None:
    ids = arrays([[5, 6, 7], [5, 6], [5, 6, 8], [5, 6, 7]])
    assert overlaps_of(["a", "a", "b", "a"], ids) == [
        Overlap(1, 2),
        Overlap(0, 0),
        Overlap(3, 0),
        Overlap(2, 3),
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), ids_st), min_size=1, max_size=12), st.integers(7, 20)
)
def test_a_row_is_never_longer_than_planned_however_units_are_cut(
    drawn: list[tuple[int, bool, list[int]]], budget: int
) -> None:
    units, computed = [f"q{unit}" for unit, _, _ in drawn], [flag for _, flag, _ in drawn]
    ids = arrays([ids for _, _, ids in drawn])
    steps = plan_epoch(
        [len(one) if flag else 0 for one, flag in zip(ids, computed, strict=True)],
        batch_size=4,
        world_size=2,
        token_budget=budget,
        seed=(0,),
        units=units,
        may_cut=(0,),
        overlaps=overlaps_of(units, ids),
    )
    examples = [
        Example(f"{k}", units[k], "policy", ids[k], np.ones(len(ids[k]), np.bool_), {})
        for k in range(len(ids))
    ]
    packs = [
        (pack, load)
        for s in steps
        for own in zip(s.packs, s.loads, strict=True)
        for pack, load in zip(*own, strict=True)
    ]
    assert sorted(k for pack, _ in packs for k in pack) == [k for k, flag in enumerate(computed) if flag]
    for pack, load in packs:
        rows = collate(pack, examples, share_prefixes=True).input_ids.shape[1] if pack else 0
        in_branches = sum(len(ids[k]) for k in pack) - rows
        assert rows + SHARED_COST * in_branches <= load + 1e-9
        assert load <= budget
    for unit in set(units):
        assert sum(any(units[k] == unit for k in step.examples) for step in steps) <= 1


def test_those_that_begin_alike_are_put_side_by_side_where_a_unit_is_cut() -> None:
    ids = arrays([[1, 2, 3, 4], [9, 8, 7, 6], [1, 2, 3, 5], [9, 8, 7, 5]])
    (step,) = plan_epoch(
        [4] * 4, batch_size=4, world_size=1, token_budget=6, seed=(0,), units=["q"] * 4, may_cut=(0,),
        overlaps=overlaps_of(["q"] * 4, ids),
    )  # fmt: skip
    assert sorted(map(sorted, step.packs[0])) == [[0, 2], [1, 3]]


@given(ids_st, ids_st)
def test_common_prefix(one: list[int], other: list[int]) -> None:
    length = common_prefix(*arrays([one, other]))
    assert one[:length] == other[:length]
    assert one[: length + 1] != other[: length + 1] or length == min(len(one), len(other))
