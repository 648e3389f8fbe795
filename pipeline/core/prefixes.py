"""What token sequences begin with in common, so that a model computes it once.

The trajectories of one question share their prompt and often their first turns, word for word. In a causal model what
is computed of a token depends on the tokens before it alone: sequences are therefore laid out as a tree of *rows*, one
per different beginning. Attention sees whole sequences again, the *branches* of the tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.records import TokenIds

Runs = tuple[tuple[int, int], ...]
"""Where each piece starts and ends; the pieces in this order are the whole."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What an example has in common with others of its unit.

    Attributes:
        rank: its place, where the examples of a unit are sorted by their tokens.
        shared: tokens with which both it and the one before it there begin.
    """

    rank: int
    shared: int


@dataclass(frozen=True, slots=True)
class Branches:
    """From U rows to the B positions of whole sequences end to end, and back.

    Attributes:
        runs: rows, in the order of the branches; B in all.
        places: positions in the branches, in the order of the rows; U in all.
    """

    runs: Runs
    places: Runs


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """Sequences with their common beginnings once.

    Attributes:
        token_ids, position_ids: int64[U], of each row.
        paths: of each sequence, the row of each of its tokens.
        lengths: of each branch: of the sequences that no other one goes on from.
        branches: None where nothing is shared, and the rows are the branches.
    """

    token_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    paths: tuple[npt.NDArray[np.int64], ...]
    lengths: tuple[int, ...]
    branches: Branches | None


def prefix_tree(sequences: Sequence[TokenIds], kinds: Sequence[bytes] | None = None) -> PrefixTree:
    """The tree of sequences that are not empty; their rows are in the order of the sorted sequences.

    Args:
        kinds: those of different kinds have nothing in common: what is computed of a token depends on them too. None:
            all are of one.
    """
    kinds = kinds if kinds is not None else [b""] * len(sequences)
    order = sorted(_sorted(sequences), key=kinds.__getitem__)
    shared = [
        common if place and kinds[index] == kinds[order[place - 1]] else 0
        for place, (index, common) in enumerate(
            zip(order, _shared_with_the_one_before(sequences, order), strict=True)
        )
    ]
    paths: dict[int, npt.NDArray[np.int64]] = {}
    num_rows, path = 0, np.zeros(0, dtype=np.int64)
    for index, common in zip(order, shared, strict=True):
        own = len(sequences[index]) - common
        path = np.concatenate([path[:common], np.arange(num_rows, num_rows + own)])
        paths[index] = path
        num_rows += own
    token_ids, position_ids = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.int64)
    for index, rows in paths.items():
        token_ids[rows] = sequences[index]
        position_ids[rows] = np.arange(len(rows))
    # A sequence that the next one repeats whole is part of that one's branch.
    goes_on = [
        common == len(sequences[index]) for index, common in zip(order, [*shared[1:], -1], strict=True)
    ]
    leaves = [index for index, is_in_the_next in zip(order, goes_on, strict=True) if not is_in_the_next]
    along = np.concatenate([paths[index] for index in leaves]) if leaves else np.zeros(0, dtype=np.int64)
    place = np.zeros(num_rows, dtype=np.int64)
    place[along] = np.arange(len(along))
    return PrefixTree(
        token_ids=token_ids,
        position_ids=position_ids,
        paths=tuple(paths[index] for index in range(len(sequences))),
        lengths=tuple(len(sequences[index]) for index in leaves),
        branches=Branches(_runs(along), _runs(place)) if len(along) > num_rows else None,
    )


def overlaps_of(units: Sequence[Hashable], sequences: Sequence[TokenIds]) -> list[Overlap]:
    """Of each example with the others of its unit."""
    members: dict[Hashable, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    found: dict[int, Overlap] = {}
    for group in members.values():
        of_group = [sequences[index] for index in group]
        order = _sorted(of_group)
        for place, common in zip(order, _shared_with_the_one_before(of_group, order), strict=True):
            found[group[place]] = Overlap(len(found), common)
    return [found[index] for index in range(len(units))]


def _sorted(sequences: Sequence[TokenIds]) -> list[int]:
    """Their numbers, by what they begin with. Ids are at least 0: as big-endian bytes they sort like numbers."""
    return sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i4").tobytes())


def _shared_with_the_one_before(sequences: Sequence[TokenIds], order: Sequence[int]) -> list[int]:
    common = [common_prefix(sequences[before], sequences[this]) for before, this in itertools.pairwise(order)]
    return [0, *common] if order else []


def common_prefix(one: TokenIds, other: TokenIds) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _runs(numbers: npt.NDArray[np.int64]) -> Runs:
    """Pieces of consecutive numbers."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    pieces: Iterable[npt.NDArray[np.int64]] = np.split(numbers, cuts)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)
