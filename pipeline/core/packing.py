"""Which examples share an optimiser step, which rank computes them, and in which packed rows.

A *pack* is one row of whole examples, end to end, at most `token_budget` tokens long. Guarantees of
`plan_epoch`:

- every example is in exactly one optimiser step, and (if it needs computing) in exactly one pack;
- the examples of one unit are in the same step; in the same pack too, if the loss compares them or they fit;
- no pack is above the token budget;
- all ranks run the same number of packs in a step (some may be empty): collectives of ZeRO stay in lockstep;
- which examples form a step depends on the seed and the batch size only, not on the ranks or the budget;
- a pack has examples of one kind, and every step its share of each kind.

Where what examples begin with in common is computed once (`pipeline.core.prefixes`), a token that another example of
the pack has as well counts `SHARED_COST`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError
from pipeline.core.latent_tasks import gates_of
from pipeline.core.prefixes import Branches, Overlap, PrefixTree, prefix_tree
from pipeline.core.records import Example, Mask, Numbers, TokenIds

Pack = tuple[int, ...]
"""Indices of the examples of one packed row. May be empty."""

SHARED_COST = 0.25
"""Of a token that is in the row already: what of its attention is computed again, and the memory that takes."""


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One optimiser step: `packs[rank][m]` is what `rank` computes as micro-batch `m`, `loads[rank][m]` its tokens, and
    `kinds[m]` of what kind they are on all ranks. Those of a kind follow each other.

    Example (two ranks, budget 100, lengths 60, 50, 40, 0):
        OptimizerStep(examples=(2, 0, 3, 1), packs=(((0, 2),), ((1,),)), loads=((100,), (50,)), kinds=(0,))
    """

    examples: tuple[int, ...]
    packs: tuple[tuple[Pack, ...], ...]
    loads: tuple[tuple[int, ...], ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples that are to be in one pack, and the tokens of it that they take."""

    examples: Pack
    load: int


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One packed row of n examples, T tokens and M target tokens, ready for a causal language model."""

    input_ids: npt.NDArray[np.int64]  # [1, T]
    position_ids: npt.NDArray[np.int64]  # [1, T], in its example
    segment_lengths: tuple[
        int, ...
    ]  # tokens of each sequence that attention sees; of each example, sum T, or:
    branches: Branches | None  # how those come from the T tokens, where some are of several examples
    predictors: npt.NDArray[np.int64]  # [M], position whose logits predict the target: the one before it
    targets: npt.NDArray[np.int64]  # [M], token ids
    example_of_target: npt.NDArray[np.int64]  # [M], position of the target's example in the pack
    unit: npt.NDArray[np.int64]  # [n], examples of the same number form a unit
    numbers: dict[str, npt.NDArray[np.float32]]  # [n], streams of one number per example
    streams: dict[str, npt.NDArray[np.float32]]  # [M] or [M, R], the others, on the targets
    gates: npt.NDArray[np.float32]  # [T, P], of P latent tasks


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int,
    world_size: int,
    token_budget: int,
    seed: Sequence[int],
    units: Sequence[str],
    may_cut: Container[int] = (),
    copies: Sequence[int] | None = None,
    overlaps: Sequence[Overlap] | None = None,
    kinds: Sequence[int] | None = None,
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
        may_cut: kinds of which a unit that is longer than the budget is cut into several packs; else it is an error.
        copies: how many examples each counts as in `batch_size`; None: as one.
        overlaps: where common beginnings are computed once.
        kinds: of what kind each example is; None: all of kind 0.

    Raises:
        UserError: an example, or a unit that must be whole, is longer than the token budget.
    """
    kind_of = kinds if kinds is not None else [0] * len(lengths)
    members: dict[tuple[int, str], list[int]] = {}
    for index, key in enumerate(zip(kind_of, units, strict=True)):
        members.setdefault(key, []).append(index)
    groups = list(members.values())
    parts = [
        _parts(group, lengths, overlaps, token_budget if kind in may_cut else math.inf)
        for (kind, _), group in members.items()
    ]
    longest = max((part.load for some in parts for part in some), default=0)
    for (_, unit), some in zip(members, parts, strict=True):
        if some and (load := max(part.load for part in some)) > token_budget:
            raise UserError(
                f"training example {unit} has {load} tokens, more than learner.tokens_per_microbatch: "
                f"{token_budget}. Raise that key to at least {longest}."
            )
    if not lengths:
        return []
    rng = np.random.default_rng(seed)
    num_examples = len(lengths) if copies is None else sum(copies)
    of_kind: dict[int, list[int]] = {}
    for number, (kind, _) in enumerate(members):
        of_kind.setdefault(kind, []).append(number)
    num_steps = min(max(map(len, of_kind.values())), math.ceil(num_examples / batch_size))
    by_kind: dict[int, list[list[int]]] = {}
    for kind, own in of_kind.items():
        shares = np.array_split(np.array(own)[rng.permutation(len(own))], num_steps)
        if len(own) < num_steps:
            shares = [shares[place] for place in rng.permutation(num_steps)]
        by_kind[kind] = [share.tolist() for share in shares]
    return [
        _plan_step(
            tuple(i for shares in by_kind.values() for group in shares[step] for i in groups[group]),
            {k: [part for group in shares[step] for part in parts[group]] for k, shares in by_kind.items()},
            world_size,
            token_budget,
        )
        for step in range(num_steps)
    ]


def _parts(
    unit: Sequence[int], lengths: Sequence[int], overlaps: Sequence[Overlap] | None, budget: float
) -> list[_Part]:
    """The computed examples of a unit in as few parts as the budget allows, those that begin alike side by side."""
    in_order = unit if overlaps is None else sorted(unit, key=lambda i: overlaps[i].rank)
    parts: list[_Part] = []
    shared = 0
    for i in in_order:
        # With the last one that is computed it has in common what all between them have.
        shared = min(shared, overlaps[i].shared) if overlaps is not None else 0
        if not lengths[i]:
            continue
        more = lengths[i] - shared + math.ceil(SHARED_COST * shared)
        if parts and parts[-1].load + more <= budget:
            parts[-1] = _Part((*parts[-1].examples, i), parts[-1].load + more)
        else:
            parts.append(_Part((i,), lengths[i]))
        shared = lengths[i]
    return parts


def packing_efficiency(plan: Sequence[OptimizerStep], token_budget: int) -> tuple[float, float]:
    """(load / token budget of all packs, load / load if every rank's pack were as long as the longest).

    The first says whether a larger or smaller budget would help, the second how little ranks wait for each
    other (1: not at all). NaN for an empty plan.
    """
    tokens = budget = slowest = 0
    for step in plan:
        tokens += sum(map(sum, step.loads))
        budget += token_budget * len(step.loads) * len(step.loads[0])
        slowest += len(step.loads) * sum(max(at_once) for at_once in zip(*step.loads, strict=True))
    return (tokens / budget, tokens / slowest) if tokens else (math.nan, math.nan)


def _plan_step(
    examples: tuple[int, ...], parts: Mapping[int, Sequence[_Part]], world_size: int, budget: int
) -> OptimizerStep:
    # A step in which nothing needs computing still runs one row.
    computed = {kind: some for kind, some in parts.items() if some} or dict(list(parts.items())[:1])
    planned = {kind: _plan_packs(some, world_size, budget) for kind, some in computed.items()}
    by_rank = [[pack for own in planned.values() for pack in own[rank]] for rank in range(world_size)]
    return OptimizerStep(
        examples=examples,
        packs=tuple(
            tuple(tuple(i for part in pack for i in part.examples) for pack in own) for own in by_rank
        ),
        loads=tuple(tuple(map(_load, own)) for own in by_rank),
        kinds=tuple(kind for kind, own in planned.items() for _ in own[0]),
    )


def _plan_packs(parts: Sequence[_Part], world_size: int, budget: int) -> list[list[list[_Part]]]:
    """The packs of each rank, as many for every one."""
    longest_first = sorted(parts, key=lambda part: -part.load)
    packs = _first_fit(longest_first, budget)
    num_packs = world_size * max(1, math.ceil(len(packs) / world_size))
    packs = _spread(longest_first, budget, num_packs) or packs + [[]] * (num_packs - len(packs))
    # Ranks wait for each other at every micro-batch: those that run at the same time should be equally long.
    packs.sort(key=_load, reverse=True)
    return [packs[rank::world_size] for rank in range(world_size)]


def _load(parts: Sequence[_Part]) -> int:
    return sum(part.load for part in parts)


def _first_fit(longest_first: Sequence[_Part], budget: int) -> list[list[_Part]]:
    """First-fit decreasing: at most 11/9 of the fewest possible packs, plus one."""
    packs: list[list[_Part]] = []
    room: list[int] = []
    for part in longest_first:
        chosen = next((p for p, free in enumerate(room) if free >= part.load), None)
        if chosen is None:
            packs.append([])
            room.append(budget)
            chosen = len(packs) - 1
        packs[chosen].append(part)
        room[chosen] -= part.load
    return packs


def _spread(longest_first: Sequence[_Part], budget: int, num_packs: int) -> list[list[_Part]] | None:
    """Longest first into the emptiest pack: nearly equal packs. None if one would overflow."""
    packs: list[list[_Part]] = [[] for _ in range(num_packs)]
    used = [0] * num_packs
    for part in longest_first:
        emptiest = min(range(num_packs), key=used.__getitem__)
        if used[emptiest] + part.load > budget:
            return None
        packs[emptiest].append(part)
        used[emptiest] += part.load
    return packs


def collate(
    pack: Pack,
    examples: Sequence[Example] | Mapping[int, Example],
    names: Iterable[str] = (),
    derived: Mapping[str, Sequence[float]] | None = None,
    *,
    share_prefixes: bool = False,
    latent_tasks: int = 0,
) -> PackedBatch:
    """Lay the examples of a pack end to end.

    The first token of an example is never a target: nothing of the same example comes before it. An empty pack becomes
    one dummy token with a target, no example and no stream, so that its rank still runs forward and backward.

    Args:
        examples: those of the pack, by their number; others need not be there.
        names: the streams to lay out; all examples have them.
        derived: further streams, one number for every example of the phase (`Prepared.streams`).
        share_prefixes: whether what several begin with is there once.
        latent_tasks: P, of the model.
    """
    if not pack:
        zero, shut = np.zeros(1, dtype=np.int64), np.zeros((1, latent_tasks), dtype=np.float32)
        return PackedBatch(zero[None], zero[None], (1,), None, zero, zero, zero, zero[:0], {}, {}, shut)
    chosen = [examples[i] for i in pack]
    sequences = [example.token_ids for example in chosen]
    of_examples = [gates_of(example.streams, latent_tasks) for example in chosen]
    if share_prefixes:
        tree = prefix_tree(sequences, [own.tobytes() for own in of_examples])
    else:
        tree = _side_by_side(sequences)
    gates = np.zeros((len(tree.token_ids), latent_tasks), dtype=np.float32)
    for path, own in zip(tree.paths, of_examples, strict=True):
        gates[path] = own
    masks = [np.concatenate([[False], example.loss_mask[1:]]) for example in chosen]
    targets = [np.flatnonzero(mask) for mask in masks]
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
        input_ids=tree.token_ids[None],
        position_ids=tree.position_ids[None],
        segment_lengths=tree.lengths,
        branches=tree.branches,
        predictors=np.concatenate([path[at - 1] for path, at in zip(tree.paths, targets, strict=True)]),
        targets=np.concatenate([ids[at] for ids, at in zip(sequences, targets, strict=True)]).astype(
            np.int64
        ),
        example_of_target=np.repeat(np.arange(len(chosen)), [len(at) for at in targets]),
        unit=np.array([unit_numbers[example.unit] for example in chosen], dtype=np.int64),
        numbers={name: value.astype(np.float32) for name, value in numbers.items()},
        streams={name: value.astype(np.float32) for name, value in streams.items()},
        gates=gates,
    )


def _side_by_side(sequences: Sequence[TokenIds]) -> PrefixTree:
    """Each sequence a branch of its own."""
    lengths = tuple(map(len, sequences))
    ends = np.cumsum(lengths)
    return PrefixTree(
        token_ids=np.concatenate(sequences).astype(np.int64),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        paths=tuple(np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)),
        lengths=lengths,
        branches=None,
    )


def _on_targets(values: Numbers, mask: Mask) -> Numbers:
    """One example's stream on its targets."""
    if values.ndim == 2:
        return values
    return values[mask] if len(values) == len(mask) else np.repeat(values, int(mask.sum()))
