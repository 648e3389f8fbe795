"""The training examples of one phase, as one rank of the learner sees them: something of all, all of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from actors.collectives import gathered, on_each_rank
from actors.learner_outputs import OF_HEAD
from pipeline.core.config import LearnerConfig
from pipeline.core.copies import copies_of
from pipeline.core.errors import UserError
from pipeline.core.example_files import read_examples, read_outlines, read_outlines_and_overlaps, unit_of
from pipeline.core.latent_tasks import most_gates
from pipeline.core.losses.joint import Joint, Objectives
from pipeline.core.losses.loss import Form, Loss
from pipeline.core.packing import OptimizerStep, plan_epoch
from pipeline.core.policies import Head
from pipeline.core.prefixes import Overlap, overlaps_of
from pipeline.core.records import Example, Numbers, Outline
from pipeline.core.training_phase import digest_of
from retriever_service.files import record_file


class PhaseExamples:
    """All ranks make one, and call its methods, together and with the same arguments but for `own`.

    What it keeps of examples on disk grows with their number and not with their tokens, until a rank loads its own.

    Attributes:
        outlines: of all examples, in their order.
        digests: of the contents of the examples; they change when these do.
        objectives: what of the loss is whose.
        overlaps: what each has in common with others of its unit; None if nobody wants to know.

    Args:
        examples: records, or Parquet shards of them.
        loss: what will be made of them.
        head: of the model.
        share_prefixes: whether to find out about overlaps.
        latent_tasks: that the model has.

    Raises:
        UserError: on all ranks; a shard that holds something else, an example without a stream that the loss needs, or
            with one of another form or that is not finite, a head that does not give what the loss needs.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[str | Path],
        loss: Loss | Joint,
        head: Head,
        *,
        share_prefixes: bool = False,
        latent_tasks: int = 0,
    ) -> None:
        self._records = [item for item in examples if isinstance(item, Example)]
        self._shards = [Path(item) for item in examples if not isinstance(item, Example)]
        by_role = isinstance(loss, Joint)  # then rows are of one role alone
        ranks, mine = dist.get_world_size(), self._shards[dist.get_rank() :: dist.get_world_size()]

        def look_at(shard: Path) -> tuple[Sequence[Outline], str, list[Overlap]]:
            outlines, overlaps = (
                read_outlines_and_overlaps(shard, by_role=by_role)
                if share_prefixes
                else (read_outlines(shard), [])
            )
            return outlines, record_file(shard).sha256, overlaps

        looked_at = gathered(on_each_rank(lambda: [look_at(shard) for shard in mine]))
        by_shard = [looked_at[number % ranks][number // ranks] for number in range(len(self._shards))]
        self.digests = [digest_of(self._records), *(digest for _, digest, _ in by_shard)]
        self.outlines: list[Outline] = list(self._records)
        overlaps = (
            overlaps_of(
                [unit_of(it, by_role) for it in self._records], [it.token_ids for it in self._records]
            )
            if share_prefixes
            else []
        )
        self._first: list[int] = []  # of each shard, which example its first one is
        for outlines, _, in_shard in by_shard:
            first = len(self.outlines)
            self._first.append(first)
            self.outlines += outlines
            overlaps += (Overlap(first + one.rank, one.shared) for one in in_shard)
        self.overlaps = overlaps if share_prefixes else None
        self.objectives = _objectives(loss, self.outlines)
        _check_outlines(self.outlines, self.objectives, head)
        _check_gates(self.outlines, latent_tasks)

    def plan(
        self, lengths: Sequence[int], config: LearnerConfig, phase_seed: int, epochs: int | None
    ) -> list[OptimizerStep]:
        """The optimiser steps of the phase.

        Args:
            lengths: tokens of each example; 0 for one that is not computed.
            config: of the learner.
            epochs: in place of the configured ones.

        Raises:
            UserError: a unit does not fit the token budget.
        """
        return [
            step
            for epoch in range(epochs or config.epochs)
            for step in plan_epoch(
                lengths,
                batch_size=config.batch_size,
                world_size=dist.get_world_size(),
                token_budget=config.tokens_per_microbatch,
                seed=(phase_seed, epoch),
                units=[outline.unit for outline in self.outlines],
                may_cut=[k for k, part in enumerate(self.objectives.parts) if not part.loss.compares],
                copies=[copies_of(outline) for outline in self.outlines],
                overlaps=self.overlaps,
                kinds=self.objectives.of_example,
            )
        ]

    def load(self, own: Iterable[int]) -> Mapping[int, Example]:
        """The examples of these numbers, which this rank computes.

        Raises:
            UserError: on all ranks; one has a stream that is not finite on the targets, or contradicts itself.
        """
        return on_each_rank(lambda: self._load(sorted(set(own))))

    def _load(self, own: Sequence[int]) -> dict[int, Example]:
        in_memory, *by_shard = np.split(np.array(own, dtype=np.int64), np.searchsorted(own, self._first))
        found = {k: self._records[k] for k in in_memory.tolist()}
        for shard, first, numbers in zip(self._shards, self._first, by_shard, strict=True):
            if len(numbers):
                found |= zip(numbers.tolist(), read_examples(shard, numbers - first), strict=True)
        for number, example in found.items():
            _check_values(example, self.objectives.loss_of(number))
        return found


def _objectives(loss: Loss | Joint, outlines: Sequence[Outline]) -> Objectives:
    try:
        return Objectives.of(loss, outlines)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_outlines(outlines: Sequence[Outline], objectives: Objectives, head: Head) -> None:
    for part in objectives.parts:
        if part.loss.output not in OF_HEAD[head]:
            raise UserError(
                f"{type(part.loss).__name__} needs {part.loss.output}, which a head {head} does not give"
            )
    for number, outline in enumerate(outlines):
        loss = objectives.loss_of(number)
        needs = f"{type(loss).__name__} needs"
        for name, form in loss.streams.items():
            shape = outline.shapes.get(name)
            if shape is None:
                raise UserError(
                    f"{needs} the stream {name}, which example {outline.id} has not; it has "
                    f"{', '.join(outline.shapes) or 'none'}"
                )
            if not _has_form(shape, form):
                raise UserError(
                    f"{needs} the stream {name} as {_FORMS[form]}; that of example {outline.id} has the shape "
                    f"{list(shape)}"
                )
            if shape == (1,) and not _are_numbers(outline.number(name), form):
                raise _not_finite(loss, name, outline)


def _check_gates(outlines: Sequence[Outline], latent_tasks: int) -> None:
    for outline in outlines:
        if (needed := most_gates(outline.shapes)) > latent_tasks:
            raise UserError(
                f"example {outline.id} was made for at least {needed} latent tasks, and the model has {latent_tasks}: "
                "make the examples again, or give the policy as many"
            )


def _are_numbers(values: float | Numbers, form: Form) -> bool:
    is_number = np.isfinite(values)
    if form == "logarithm":
        is_number |= np.isneginf(values)
    return bool(np.all(is_number))


def _check_values(example: Example, loss: Loss) -> None:
    for name, form in loss.streams.items():
        values = example.streams[name]
        on_targets = values[1:][example.loss_mask[1:]] if values.ndim == 1 and len(values) > 1 else values
        if not _are_numbers(on_targets, form):
            raise _not_finite(loss, name, example)


def _not_finite(loss: Loss, stream: str, example: Outline) -> UserError:
    return UserError(
        f"{type(loss).__name__} needs a finite stream {stream}; that of example {example.id} is not"
    )


_FORMS: dict[Form, str] = {
    "number": "one number",
    "logarithm": "one number",
    "tokens": "one number per token, or one for all",
    "rows": "a row of numbers per target",
}


def _has_form(shape: tuple[int, ...], form: Form) -> bool:
    """Whether it is as a loss wants it; that the lengths fit has been seen to by the outline."""
    match form:
        case "number" | "logarithm":
            return shape == (1,)
        case "tokens":
            return len(shape) == 1
        case "rows":
            return len(shape) == 2
