"""Memory as a list of named parts, on a device and on its host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GIB = 2**30
ACCELERATOR_CONTEXT = 2 * GIB
"""CUDA's context, libraries loaded into it, NCCL's buffers: of each process on a GPU. An estimate."""

Where = Literal["gpu", "host"]
PLACES: tuple[Where, ...] = ("gpu", "host")
Device = Literal["cpu", "gpu"]
Dtype = Literal["float32", "bfloat16"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
"""Of an element."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part of what a process holds at its peak."""

    name: str
    bytes: int
    where: Where


@dataclass(frozen=True, slots=True)
class Memory:
    """What one engine, or one rank, holds at its peak."""

    components: tuple[Component, ...]

    def on(self, where: Where) -> int:
        """Bytes there."""
        return sum(part.bytes for part in self.components if part.where == where)

    def only(self, *names: str) -> Memory:
        """These components."""
        return Memory(tuple(part for part in self.components if part.name in names))

    def of(self, name: str) -> int:
        """Bytes of one component, wherever it is; 0 if there is none of that name."""
        return sum(part.bytes for part in self.components if part.name == name)


def memory(parts: Iterable[tuple[str, float, Where]]) -> Memory:
    """Of parts (name, bytes, where); those of no size are left out."""
    return Memory(tuple(Component(name, round(size), where) for name, size, where in parts if size >= 1))


def number_format(configured: Literal["auto", "float32", "bfloat16"], device: Device) -> Dtype:
    """What `auto` stands for, of engines and learners alike."""
    if configured != "auto":
        return configured
    return "bfloat16" if device == "gpu" else "float32"


def gib(size: float) -> str:
    """A number of bytes for a person."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.0f} MiB"
