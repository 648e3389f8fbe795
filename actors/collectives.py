"""Small things that all ranks of a learner do together, over the hosts' network. Every one of them must call.

Objects, decisions and waits for disks do not go through NCCL: a rank that waits there keeps a GPU busy, and is ended
when another's disk takes longer than a collective may.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""Longest wait for another rank's disk. Who watches the ranks ends them long before."""

_hosts: Any = None
"""Of this process; None before `meet`: the group of all."""


def choose_interface(address: str) -> None:
    """Let gloo listen where this host reaches rank 0. By itself it listens where the host's name leads, and that is
    often a loopback address."""
    if name := interface_to(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def meet() -> None:
    """Make the group that all below goes through, behind the process group of all ranks."""
    global _hosts
    _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)


def interface_to(address: str) -> str | None:
    """The network interface of this host through which it reaches an address; None if that is not known."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect(target)  # sends nothing
            own = route.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in {a.address for a in addresses}), None)


def gathered(mine: T) -> list[T]:
    """What every rank has, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=_hosts)
    return everyone


def is_so_anywhere(*here: bool) -> list[bool]:
    """Each of these, if it is so on some rank."""
    flags = torch.tensor(here, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_hosts)
    return [bool(flag) for flag in flags]


_OURS = (OSError, UserError, RetrieverError)


def on_each_rank(work: Callable[[], T]) -> T:
    """Run `work` on every rank; each gets its own result, or all the error of the first one that has one."""
    failure: Exception | None = None
    try:
        mine = work()
    except _OURS as error:
        failure = error
    for one in gathered(failure):
        if one is not None:
            raise one
    return mine


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; all ranks get its result, or its error: a full disk leaves nobody waiting."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except _OURS as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=_hosts)
    if isinstance(outcome[0], _OURS):
        raise outcome[0]
    result: T = outcome[0]
    return result


def wait_for_all() -> None:
    """Until every rank is here."""
    dist.barrier(group=_hosts)
