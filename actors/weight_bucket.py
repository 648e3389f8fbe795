"""Buckets of named tensors as bytes: checksums, and the shared memory that carries them within a node.

Every byte that `write_bucket` puts into a segment is covered by the manifest's digest, and the digest of any set of
tensors can be computed on either side, on any device.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Bucket = Sequence[tuple[str, torch.Tensor]]
"""Some of the model's parameters under their Hugging Face names, whole (not sharded)."""

_ALIGNMENT = 64
_ROW_WORDS = 4096


def tensor_checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum of the tensor's bytes, the same on every device.

    One pass at memory speed: sums of 32 KiB rows of 64-bit words, combined with odd weights, modulo 2**64. It finds
    damaged, missing and misplaced data; it is no defence against an attacker.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    rows = words.numel() // _ROW_WORDS
    tail = data[whole:].to(torch.int64)
    sums = torch.cat(
        [words[: rows * _ROW_WORDS].view(rows, _ROW_WORDS).sum(dim=1), words[rows * _ROW_WORDS :], tail + 1]
    )
    weights = 2 * torch.arange(sums.numel(), device=sums.device) + 1
    return int((sums * weights).sum().item()) & (2**64 - 1)


class Digest:
    """The digest of a set of named tensors: order of arrival and bucket borders do not matter."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._lines[name] = f"{name} {dtype} {tuple(tensor.shape)} {tensor_checksum(tensor):016x}"

    def update(self, other: Digest) -> None:
        self._lines.update(other._lines)

    def hexdigest(self) -> str:
        return hashlib.sha256(
            "\n".join(self._lines[name] for name in sorted(self._lines)).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)


class Segment:
    """Anonymous shared memory that any process of this user and node can map through `path`; it grows as needed.

    A memfd, not a named segment: a killed process leaves nothing behind, and the size of /dev/shm (64 MiB in a default
    container) does not matter. Used again for bucket after bucket, because touching fresh memory costs several times
    as much as copying; readers therefore must not hold on to it.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("exsearch-weights", os.MFD_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._fd)
        """Gives the memory back once every reader has unmapped it; happens by itself when the segment is collected."""
        self._data = torch.empty(0, dtype=torch.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def room(self, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes as uint8[nbytes], writable."""
        if nbytes > self._data.numel():
            os.ftruncate(self._fd, nbytes)
            self._data = torch.frombuffer(mmap.mmap(self._fd, nbytes), dtype=torch.uint8)
        return self._data[:nbytes]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where each tensor of a bucket lies in its segment; `digest` covers the bucket."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    digest: str

    def tensors(self, data: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Views into `data` (uint8[nbytes])."""
        views = []
        for name, dtype_name, shape, offset in zip(
            self.names, self.dtype_names, self.shapes, self.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            views.append((name, data[offset : offset + size].view(dtype).view(shape)))
        return views


def write_bucket(bucket: Bucket, segment: Segment, sent: Digest) -> Manifest:
    """Copies a bucket into the segment and adds its tensors to `sent`."""
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in bucket]
    starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    digest = Digest()
    for name, tensor in bucket:
        digest.add(name, tensor)
    sent.update(digest)
    manifest = Manifest(
        names=[name for name, _ in bucket],
        dtype_names=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        shapes=[list(tensor.shape) for _, tensor in bucket],
        offsets=starts[:-1],
        nbytes=max(starts[-1], _ALIGNMENT),
        digest=digest.hexdigest(),
    )
    targets = manifest.tensors(segment.room(manifest.nbytes))
    for (_, target), (_, tensor) in zip(targets, bucket, strict=True):
        target.copy_(tensor.detach())
    return manifest
