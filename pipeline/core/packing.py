"""Which examples share an optimiser step, which rank computes them, and in which packed rows.

A *pack* is one row of whole examples, end to end, at most `token_budget` tokens long. Guarantees of
`plan_epoch`:

- every example is in exactly one optimiser step, and (if it needs computing) in exactly one pack;
- the examples of one unit are in the same step and in the same pack;
- no pack is above the token budget;
- all ranks run the same number of packs in a step (some may be empty): collectives of ZeRO stay in lockstep;
- which examples form a step depends on the seed and the batch size only, not on the ranks or the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError
from pipeline.core.records import Example, Mask, Numbers

Pack = tuple[int, ...]
"""Indices of the examples of one packed row. May be empty."""


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One optimiser step: `packs[rank][m]` is what `rank` computes as micro-batch `m`.

    Example (two ranks, budget 100, lengths 60, 50, 40, 0):
        OptimizerStep(examples=(2, 0, 3, 1), packs=(((0, 2),), ((1,),)))
    """

    examples: tuple[int, ...]
    packs: tuple[tuple[Pack, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One packed row of n examples, T tokens and M target tokens, ready for a causal language model."""

    input_ids: npt.NDArray[np.int64]  # [1, T]
    position_ids: npt.NDArray[np.int64]  # [1, T], from 0 again at each example
    segment_lengths: tuple[int, ...]  # tokens of each example, sum T
    predictors: npt.NDArray[np.int64]  # [M], position whose logits predict the target: the one before it
    targets: npt.NDArray[np.int64]  # [M], token ids
    example_of_target: npt.NDArray[np.int64]  # [M], position of the target's example in the pack
    unit: npt.NDArray[np.int64]  # [n], examples of the same number form a unit
    numbers: dict[str, npt.NDArray[np.float32]]  # [n], streams of one number per example
    streams: dict[str, npt.NDArray[np.float32]]  # [M] or [M, R], the others, on the targets


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int,
    world_size: int,
    token_budget: int,
    seed: Sequence[int],
    units: Sequence[str],
) -> list[OptimizerStep]:
    """The optimiser steps of one epoch, in a seeded random order.

    Args:
        lengths: tokens of each example; 0 for one that belongs to its batch but needs no computing (zero
            weight).
        batch_size: examples of a step. They are spread evenly, so that no step has just a few; with units of several
            examples a step may have some more.
        world_size: number of ranks.
        token_budget: most tokens of a pack (`learner.tokens_per_microbatch`).
        seed: e.g. (phase seed, epoch).
        units: the name of each example's unit.

    Raises:
        UserError: a unit is longer than the token budget.
    """
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    groups = list(members.values())
    unit_lengths = [sum(lengths[i] for i in group) for group in groups]
    for unit, length in zip(members, unit_lengths, strict=True):
        if length > token_budget:
            raise UserError(
                f"training example {unit} has {length} tokens, more than learner.tokens_per_microbatch: "
                f"{token_budget}. Raise that key to at least {max(unit_lengths)}."
            )
    if not lengths:
        return []
    order = np.random.default_rng(seed).permutation(len(groups))
    batches = np.array_split(order, min(len(groups), math.ceil(len(lengths) / batch_size)))
    steps = [_plan_step([int(u) for u in batch], unit_lengths, world_size, token_budget) for batch in batches]
    return [_of_examples(step, groups, lengths) for step in steps]


def _of_examples(
    step: OptimizerStep, groups: Sequence[Sequence[int]], lengths: Sequence[int]
) -> OptimizerStep:
    """A step of units as one of their examples."""
    return OptimizerStep(
        examples=tuple(i for unit in step.examples for i in groups[unit]),
        packs=tuple(
            tuple(tuple(i for unit in pack for i in groups[unit] if lengths[i]) for pack in packs)
            for packs in step.packs
        ),
    )


def packing_efficiency(
    plan: Sequence[OptimizerStep], lengths: Sequence[int], token_budget: int
) -> tuple[float, float]:
    """(tokens / token budget of all packs, tokens / tokens if every rank's pack were as long as the longest).

    The first says whether a larger or smaller budget would help, the second how little ranks wait for each
    other (1: not at all). NaN for an empty plan.
    """
    tokens = budget = slowest = 0
    for step in plan:
        loads = [[sum(lengths[i] for i in pack) for pack in packs] for packs in step.packs]
        tokens += sum(map(sum, loads))
        budget += token_budget * len(loads) * len(loads[0])
        slowest += len(loads) * sum(max(at_once) for at_once in zip(*loads, strict=True))
    return (tokens / budget, tokens / slowest) if tokens else (math.nan, math.nan)


def _plan_step(batch: Sequence[int], lengths: Sequence[int], world_size: int, budget: int) -> OptimizerStep:
    longest_first = sorted((i for i in batch if lengths[i] > 0), key=lambda i: -lengths[i])
    packs = _first_fit(longest_first, lengths, budget)
    num_packs = world_size * max(1, math.ceil(len(packs) / world_size))
    packs = _spread(longest_first, lengths, budget, num_packs) or packs + [[]] * (num_packs - len(packs))
    # Ranks wait for each other at every micro-batch: those that run at the same time should be equally long.
    packs.sort(key=lambda pack: -sum(lengths[i] for i in pack))
    rounds = [packs[start : start + world_size] for start in range(0, num_packs, world_size)]
    by_rank = tuple(tuple(tuple(one_round[rank]) for one_round in rounds) for rank in range(world_size))
    return OptimizerStep(examples=tuple(batch), packs=by_rank)


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible packs, plus one."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i in longest_first:
        chosen = next((p for p, free in enumerate(room) if free >= lengths[i]), None)
        if chosen is None:
            packs.append([])
            room.append(budget)
            chosen = len(packs) - 1
        packs[chosen].append(i)
        room[chosen] -= lengths[i]
    return packs


def _spread(
    longest_first: Sequence[int], lengths: Sequence[int], budget: int, num_packs: int
) -> list[list[int]] | None:
    """Longest first into the emptiest pack: nearly equal packs. None if one would overflow."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    used = [0] * num_packs
    for i in longest_first:
        emptiest = min(range(num_packs), key=used.__getitem__)
        if used[emptiest] + lengths[i] > budget:
            return None
        packs[emptiest].append(i)
        used[emptiest] += lengths[i]
    return packs


def collate(
    pack: Pack,
    examples: Sequence[Example] | Mapping[int, Example],
    names: Iterable[str] = (),
    derived: Mapping[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """Lay the examples of a pack end to end.

    The first token of an example is never a target: nothing of the same example comes before it. An empty pack becomes
    one dummy token with a target, no example and no stream, so that its rank still runs forward and backward.

    Args:
        examples: those of the pack, by their number; others need not be there.
        names: the streams to lay out; all examples have them.
        derived: further streams, one number for every example of the phase (`Prepared.streams`).
    """
    if not pack:
        zero = np.zeros(1, dtype=np.int64)
        return PackedBatch(zero[None], zero[None], (1,), zero, zero, zero, zero[:0], {}, {})
    chosen = [examples[i] for i in pack]
    lengths = tuple(len(example.token_ids) for example in chosen)
    token_ids = np.concatenate([example.token_ids for example in chosen]).astype(np.int64)
    masks = [np.concatenate([[False], example.loss_mask[1:]]) for example in chosen]
    targets = np.flatnonzero(np.concatenate(masks))
    unit_numbers = {
        unit: number for number, unit in enumerate(dict.fromkeys(example.unit for example in chosen))
    }
    numbers = {name: np.array([values[i] for i in pack]) for name, values in (derived or {}).items()}
    streams = {}
    for name in names:
        values = [example.streams[name] for example in chosen]
        if all(one.shape == (1,) for one in values):
            numbers[name] = np.concatenate(values)
        else:
            streams[name] = np.concatenate([_on_targets(o, m) for o, m in zip(values, masks, strict=True)])
    return PackedBatch(
        input_ids=token_ids[None],
        position_ids=np.concatenate([np.arange(length) for length in lengths])[None],
        segment_lengths=lengths,
        predictors=targets - 1,
        targets=token_ids[targets],
        example_of_target=np.repeat(np.arange(len(chosen)), [int(mask.sum()) for mask in masks]),
        unit=np.array([unit_numbers[example.unit] for example in chosen], dtype=np.int64),
        numbers={name: value.astype(np.float32) for name, value in numbers.items()},
        streams={name: value.astype(np.float32) for name, value in streams.items()},
    )


def _on_targets(values: Numbers, mask: Mask) -> Numbers:
    """One example's stream on its targets."""
    if values.ndim == 2:
        return values
    return values[mask] if len(values) == len(mask) else np.repeat(values, int(mask.sum()))
