"""The learner's weights under their checkpoint names, whole, a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from actors import learner_setup
from actors.weight_transfer import Bucket


def named_weights(
    model: torch.nn.Module, bucket_bytes: int, dtype: torch.dtype, *, partitioned: bool
) -> Iterator[Bucket]:
    """Buckets of (name in a Hugging Face checkpoint, whole tensor), adapters merged.

    Tied weights come once. All ranks must exhaust the iterator in step: where parameters are partitioned (ZeRO-3) each
    bucket is gathered from all of them. The tensors outlive that, but may be the parameters themselves, and then
    change with later training.

    Args:
        bucket_bytes: most bytes of a bucket; a larger tensor has one of its own.
        dtype: of the tensors.
    """
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        # numel() of a parameter that ZeRO-3 has partitioned is 0.
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * dtype.itemsize
        if bucket and size + num_bytes > bucket_bytes:
            yield _bucket(model, bucket, dtype, partitioned)
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += num_bytes
    yield _bucket(model, bucket, dtype, partitioned)


@torch.no_grad()
def _bucket(
    model: torch.nn.Module,
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    dtype: torch.dtype,
    partitioned: bool,
) -> Bucket:
    # peft keeps the weight W of an adapted module under MODULE.base_layer.weight.
    adapted: dict[str, Any] = {
        name: model.get_submodule(name.removesuffix(".base_layer.weight"))
        for name, _ in parameters
        if name.endswith(".base_layer.weight")
    }
    adapters = [p for m in adapted.values() for n, p in m.named_parameters() if n.startswith("lora_")]
    whole = []
    with gathered([parameter for _, parameter in parameters] + adapters, partitioned):
        for name, parameter in parameters:
            if name in adapted:
                module = adapted[name]
                deltas = [module.get_delta_weight(adapter).float() for adapter in module.lora_A]
                tensor = sum(deltas, parameter.float()).to(dtype)
            else:
                tensor = parameter.detach().to(dtype, copy=partitioned)
            whole.append((name.replace(".base_layer.", "."), tensor))
    return whole


def gathered(
    parameters: list[torch.nn.Parameter], partitioned: bool
) -> contextlib.AbstractContextManager[Any]:
    """A context in which all of every parameter is on this rank."""
    if not partitioned:
        return contextlib.nullcontext()
    whole: contextlib.AbstractContextManager[Any] = learner_setup.import_deepspeed().zero.GatheredParameters(
        parameters
    )
    return whole


@torch.no_grad()
def not_finite(model: torch.nn.Module) -> list[str]:
    """Parameters with a weight that is not finite, as far as this rank holds them. No collective, no copy."""
    names, extremes = [], []
    for name, parameter in model.named_parameters():
        held = _held(parameter)
        if held.numel():
            names.append(name)
            extremes.append(torch.stack(held.aminmax()).isfinite().all().cpu())
    return [name for name, fine in zip(names, extremes, strict=True) if not fine]


def _held(parameter: Any) -> torch.Tensor:
    """All of a parameter, or this rank's partition of it (ZeRO-3) without the padding, in which anything may stand."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    partition: torch.Tensor = parameter.ds_tensor
    rest = parameter.ds_numel - dist.get_rank() * partition.numel()
    return partition[: max(0, rest)]
