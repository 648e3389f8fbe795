"""The time that a pool is at work: its workers are watched, those that are away are replaced, new ones join, and each
gets as much to do as it has room for."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from actors import heartbeat
from actors.deaths import RESTART_PAUSE_S, in_words
from actors.hands import Hands
from actors.heartbeat import Silent
from actors.seats import Newcomer, Seat, alive_nodes, draining_nodes
from actors.session import ClusterError
from pipeline.core.config import ClusterConfig, RolloutConfig
from retriever_service.backoff import Backoff

logger = logging.getLogger(__name__)

NODES_EVERY_S = 2.0
"""How often Ray is asked which nodes are to leave, in seconds."""

NODE_NEWS_S = 1.0
"""The end of a worker may be known so much earlier than that of its node, in seconds."""


class Shift:
    """Failures are counted from its beginning.

    Args:
        name: of the policy, for messages.
        seats: of the pool; workers come and go there.
        slots: of each worker's engine.
        ask_for: asks Ray for a worker for the seat with this number.
        bring_up: lets a worker that has room serve the current version, within `cluster.start_timeout_s`.
        lose: ends a worker, for this reason.
    """

    def __init__(
        self,
        name: str,
        rollout: RolloutConfig,
        cluster: ClusterConfig,
        seats: Sequence[Seat],
        slots: int,
        ask_for: Callable[[int], Newcomer],
        bring_up: Callable[[Newcomer], Awaitable[None]],
        lose: Callable[[Any, str], None],
    ) -> None:
        self.name, self.rollout, self.cluster, self.seats = name, rollout, cluster, seats
        self._ask_for, self._bring_up, self._lose = ask_for, bring_up, lose
        self._backoff = Backoff(RESTART_PAUSE_S)
        self._failures: list[str | None] = []
        """The node of each worker that failed; None where it never had one."""
        self.hands = Hands(slots, self._employs, self.let_go, lose, self._spawn)
        self._leaving: list[Any] = []
        """Workers on nodes that are to leave, with something in hand."""
        self._filling: set[int] = set()
        """The seats that somebody is on the way to."""
        self._arrival = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Begin and end it.

        Raises:
            ClusterError: fewer than `rollout.min_workers` are left, after more than `rollout.max_restarts` failures or
                without room for others.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._spawn(self._watch_nodes())
                for seat in self.seats:
                    if seat.worker is not None:
                        self._hire(seat.worker)
                    else:
                        self._fill(seat, "it was not there when this phase began")
                yield
                for task in self._background:
                    task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            for worker in self._leaving:
                ray.kill(worker)

    # ---------------------------------------------------------------- who works

    async def worker_for(self, number: int) -> Any:
        """See `EnginePool.worker_for`."""
        while not (present := [seat.worker for seat in self.seats if seat.worker is not None]):
            self._arrival.clear()
            await self._arrival.wait()
        return present[number % len(present)]

    def let_go(self, worker: Any) -> None:
        """It has nothing in hand any more: where it is about to leave it ends, which makes its node free to go."""
        if self._is_leaving(worker):
            self._leaving = [leaving for leaving in self._leaving if leaving is not worker]
            ray.kill(worker)

    def replace(self, seat: Seat, cause: str) -> None:
        """The worker of this seat was lost and ended."""
        self._failures.append(seat.node)
        self._fill(seat, cause)

    # ---------------------------------------------------------------- watching

    def _employs(self, worker: Any) -> bool:
        """Whether it may be given work: it is neither lost nor about to leave."""
        return any(seat.worker is worker for seat in self.seats)

    def _is_leaving(self, worker: Any) -> bool:
        return any(leaving is worker for leaving in self._leaving)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it until the shift ends."""
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _hire(self, worker: Any) -> None:
        self.hands.hire(worker)
        self._arrival.set()
        self._spawn(self._watch(worker))

    async def _watch(self, worker: Any) -> None:
        """Until it has gone, or does not answer a ping within `cluster.heartbeat_timeout_s`."""
        limit = self.cluster.heartbeat_timeout_s
        while True:
            await asyncio.sleep(limit / 4)
            if not self._employs(worker) and not self._is_leaving(worker):
                return
            try:
                await heartbeat.answer(worker.ping.remote(), limit, "cluster.heartbeat_timeout_s")
            except (Silent, RayError) as error:
                self._lose(worker, in_words(error))

    async def _watch_nodes(self) -> None:
        """Workers on a node that is to leave get no more work; others are asked for at once."""
        while True:
            await asyncio.sleep(NODES_EVERY_S)
            draining = await asyncio.to_thread(draining_nodes)
            for seat in self.seats:
                if seat.worker is not None and seat.node in draining:
                    logger.warning(f"rollout worker {seat.index} of {self.name} leaves: its node is drained")
                    self._leaving.append(seat.worker)
                    leaving, seat.worker = seat.worker, None
                    self._fill(seat, "its node was drained")
                    if not self.hands.holds(leaving):
                        self.let_go(leaving)

    # ---------------------------------------------------------------- replacing

    def _fill(self, seat: Seat, cause: str) -> None:
        self._filling.add(seat.index)
        self._spawn(self._bring(seat, cause))

    async def _bring(self, seat: Seat, cause: str) -> None:
        """Put a worker that serves the current version onto an empty seat, or go on without.

        Raises:
            ClusterError: too many failures or no room, and too few workers are left.
        """
        for attempt in itertools.count():
            if await self._failed_too_often():
                break
            await asyncio.sleep(self._backoff.pause_s(attempt))
            newcomer = seat.newcomer = seat.newcomer or self._ask_for(seat.index)
            seconds = self.cluster.start_timeout_s
            try:
                await self._until_it_has_room(newcomer, cause)
                await self._bring_up(newcomer)
            except TimeoutError:
                cause = f"a new engine did not start within {seconds:g} s (cluster.start_timeout_s)"
            except RayError as error:
                cause = f"a new engine did not start: {in_words(error)}"
            else:
                seat.take(newcomer)
                self._filling.remove(seat.index)
                logger.warning(f"rollout worker {seat.index} of {self.name} joins")
                self._hire(seat.worker)
                return
            self._failures.append(newcomer.node)
            seat.send_away()
            logger.warning(f"rollout worker {seat.index} of {self.name}: {cause}")
        self._filling.remove(seat.index)
        self._go_on_without(seat, cause)

    async def _until_it_has_room(self, newcomer: Newcomer, cause: str) -> None:
        """For as long as it takes, while there are enough others."""
        seconds = self.cluster.start_timeout_s
        placed = asyncio.ensure_future(newcomer.has_room())
        try:
            while not (await asyncio.wait([placed], timeout=seconds))[0]:
                left = sum(seat.worker is not None for seat in self.seats)
                if left < self.rollout.min_workers:
                    raise ClusterError(
                        f"{left} rollout workers of {self.name} are left (rollout.min_workers: "
                        f"{self.rollout.min_workers}), and there was no room for another within {seconds:g} s "
                        f"(cluster.start_timeout_s); last: {cause}"
                    )
            placed.result()
        finally:
            placed.cancel()

    async def _failed_too_often(self) -> bool:
        if self._failed() <= self.rollout.max_restarts:
            return False
        await asyncio.sleep(NODE_NEWS_S)
        return self._failed() > self.rollout.max_restarts

    def _failed(self) -> int:
        """Failures so far. A worker that went with its node did not fail."""
        alive = alive_nodes() if self._failures else set()
        return sum(node is None or node in alive for node in self._failures)

    def _go_on_without(self, seat: Seat, cause: str) -> None:
        left = sum(s.worker is not None or s.index in self._filling for s in self.seats)
        what = (
            f"rollout workers of {self.name} failed {self._failed()} times in one phase (rollout.max_restarts: "
            f"{self.rollout.max_restarts})"
        )
        if left < self.rollout.min_workers:
            raise ClusterError(
                f"{what}; {left} of {len(self.seats)} are left (rollout.min_workers: {self.rollout.min_workers}); "
                f"last: {cause}"
            )
        logger.warning(
            f"{what}; the phase goes on without worker {seat.index}, with {left} of {len(self.seats)}; last: {cause}"
        )
