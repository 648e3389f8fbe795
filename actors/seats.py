"""Where rollout workers sit: the one that works there, the one that is on its way; and what Ray knows of the nodes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray

from actors.retriever import RetrieverClient


class Newcomer:
    """A worker that was asked for and serves nothing yet. Ray starts it where and when there is room.

    Args:
        worker: its handle.
        retriever: what it was told to retrieve with.
    """

    def __init__(self, worker: Any, retriever: RetrieverClient) -> None:
        self.worker, self.retriever = worker, retriever
        self.node: str | None = None
        """None until there is room for it."""
        self._version: int | None = None
        """That its engine was told to start with."""
        self._started: Any = None

    async def has_room(self) -> None:
        """Waits until it has, without a bound."""
        self.node = await self.worker.where.remote()

    async def serves(self, model: str, version: int, retriever: RetrieverClient, seconds: float) -> None:
        """Waits until its engine is up and serves `version`, also where it began to start with an earlier one.

        Raises:
            TimeoutError: it took more than so many seconds.
            RayError: it failed.
        """
        async with asyncio.timeout(seconds):
            if self._started is None:
                self._started, self._version = self.worker.start.remote(model, version), version
            await self._started
            if self._version != version:
                await self.worker.reload.remote(model, version, seconds)
                self._version = version
            if self.retriever is not retriever:
                await self.worker.search_with.remote(retriever)
                self.retriever = retriever


@dataclass
class Seat:
    """The place of one worker. While it is away (None) the others do its work."""

    index: int
    worker: Any = None
    node: str = ""
    newcomer: Newcomer | None = None
    """Who is to sit there next."""

    def send_away(self) -> None:
        """End who is on the way here."""
        if self.newcomer is not None:
            ray.kill(self.newcomer.worker)
            self.newcomer = None

    def take(self, newcomer: Newcomer) -> None:
        """Who was on the way works here now."""
        assert newcomer.node is not None
        self.worker, self.node, self.newcomer = newcomer.worker, newcomer.node, None


def alive_nodes() -> set[str]:
    """Ids of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> set[str]:
    """Ids of the nodes that were told to leave: by Ray's autoscaler, by SIGTERM, or because they are preempted."""
    # What Ray's own libraries use. There is no public call that does without the dashboard.
    return set(ray._private.state.state.get_draining_nodes())
