"""The learner's float32 weights and Adam moments, on disk by parameter name.

What a rank holds of them depends on the ZeRO stage and on the number of ranks: under stages 1 to 3 ranges of
parameters, as parts of a flat tensor that the optimiser steps. A checkpoint names each range by its parameter and where
in it the range begins. So ranks of any number and stage find theirs, and the same ones read back what they wrote.
Frozen parameters are not in it: they are those of the model that the learner started on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actors.collectives import wait_for_all
from pipeline.core.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 1 << 30
"""About this much goes into one file."""
Bucket = dict[str, torch.Tensor]
"""Tensors by kind (weight or moment), start in the parameter, and parameter."""


@dataclass(frozen=True)
class _Range:
    """A range of a parameter that this rank updates, and where it lies."""

    name: str
    start: int  # in the parameter, flattened
    size: int
    flat: torch.Tensor  # what the optimiser steps; its moments have the same shape
    offset: int  # of the range in `flat`

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The range as a view of `flat`, or of a moment of it."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.size]


def buckets(engine: Any) -> Iterator[Bucket]:
    """Copies of this rank's share in the host's memory, at most about `FILE_BYTES` at a time. No collective."""
    optimizer = engine.basic_optimizer
    bucket: Bucket = {}
    size = 0
    for part in _shares(engine):
        state = optimizer.state.get(part.flat, {})
        for kind, tensor in {"weight": part.flat, **{k: state[k] for k in MOMENTS if k in state}}.items():
            bucket[f"{kind}/{part.start}/{part.name}"] = part.of(tensor).to("cpu", copy=True)
            size += 4 * part.size
        if size >= FILE_BYTES:
            yield bucket
            bucket, size = {}, 0
    yield bucket


def share_bytes(engine: Any) -> int:
    """Most bytes that all `buckets` take together."""
    return sum(4 * part.size * (1 + len(MOMENTS)) for part in _shares(engine))


def write(buckets: Iterable[Bucket], directory: Path) -> list[Path]:
    """Write this rank's share into a directory, a file per bucket. No collective.

    Raises:
        OSError: the disk is full, or what else keeps a file from being written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for count, bucket in enumerate(buckets):
        path = directory / f"rank_{dist.get_rank()}_{count:03d}.safetensors"
        try:
            save_file(bucket, path)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        paths.append(path)
    return paths


def read(engine: Any, directory: Path, adam_steps: int) -> None:
    """Fill weights and moments from what ranks of any layout wrote (collective).

    Args:
        adam_steps: that the moments are made of; 0: there are none.

    Raises:
        UserError: it is of a model with other trained parameters.
    """
    optimizer = engine.basic_optimizer
    with contextlib.ExitStack() as files:
        pieces = _pieces(directory, files)
        _check_names(engine, pieces)
        for part in _ranges(engine):
            tensors = {"weight": part.flat}
            if adam_steps:
                state = _moments(optimizer, part.flat, adam_steps)
                tensors |= {kind: state[kind] for kind in MOMENTS}
            for kind, tensor in tensors.items():
                _fill(part.of(tensor), part.start, pieces.get((kind, part.name), []))
    wait_for_all()
    _refresh_model(engine)


def adam_steps(engine: Any) -> int:
    """Optimiser steps that Adam's moments are made of."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values()), default=0)


# ---------------------------------------------------------------- who holds what


def _ranges(engine: Any) -> Iterator[_Range]:
    """What this rank updates, in an order that all ranks of a layout share."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield _Range(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * partition
            size = min(partition, parameter.ds_numel - start)  # the last partition is padded
            if size > 0:
                yield _Range(name, start, size, optimizer.fp32_partitioned_groups_flat[group], offset)
        elif (mapping := parameter._hp_mapping) is not None:
            flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
            of_parameter, of_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Range(name, of_parameter.start, of_flat.numel, flat, of_flat.start)


def _shares(engine: Any) -> Iterator[_Range]:
    """What this rank writes: what it updates, but where all ranks hold everything they share the writing."""
    is_shared = engine.zero_optimization_stage() == 0
    for number, part in enumerate(_ranges(engine)):
        if not is_shared or number % dist.get_world_size() == dist.get_rank():
            yield part


def _moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """The optimiser's state of a tensor that may not have been stepped yet."""
    state: dict[str, torch.Tensor] = optimizer.state[flat]
    state["step"] = torch.tensor(float(steps), device=flat.device)
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(flat, requires_grad=False)
    return state


@torch.no_grad()
def _refresh_model(engine: Any) -> None:
    """Let the model compute with the float32 weights that the optimiser has now (collective)."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


# ---------------------------------------------------------------- files

_Piece = tuple[int, int, Any, str]
"""Start in the parameter, size, open file, name in it."""


def _pieces(directory: Path, files: contextlib.ExitStack) -> dict[tuple[str, str], list[_Piece]]:
    """What the files hold of (weight or moment, parameter)."""
    pieces: dict[tuple[str, str], list[_Piece]] = {}
    for path in sorted(directory.glob("rank_*.safetensors")):
        file: Any = files.enter_context(safe_open(path, "pt"))
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            kind, start, name = key.split("/", 2)
            size = file.get_slice(key).get_shape()[0]
            pieces.setdefault((kind, name), []).append((int(start), size, file, key))
    return pieces


def _check_names(engine: Any, pieces: dict[tuple[str, str], list[_Piece]]) -> None:
    wanted = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    found = {
        name: sum(size for _, size, _, _ in some) for (kind, name), some in pieces.items() if kind == "weight"
    }
    if different := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
        name = different[0]
        raise UserError(
            f"the learner checkpoint has other trained parameters than this model: {len(different)} differ, such as "
            f"{name} ({found.get(name, 0)} numbers there, {wanted.get(name, 0)} here). Is learner.lora or the model "
            "another one?"
        )


def _fill(target: torch.Tensor, start: int, pieces: list[_Piece]) -> None:
    """Copy into `target`, the range of a parameter that begins at `start`, what the pieces have of it."""
    for at, size, file, key in pieces:
        first, last = max(start, at), min(start + len(target), at + size)
        if first < last:
            target[first - start : last - start].copy_(file.get_slice(key)[first - at : last - at])
