"""Small things that all ranks of a learner do together. Every one of them must call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError

T = TypeVar("T")


def gathered(mine: T) -> list[T]:
    """What every rank has, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


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
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], _OURS):
        raise outcome[0]
    result: T = outcome[0]
    return result
