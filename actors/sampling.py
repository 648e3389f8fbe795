"""One phase of sampling: every task served exactly once, whatever dies meanwhile.

The driver moves references and small summaries, never episodes. If a worker dies or hangs, what it had in hand is
sampled again, by its replacement or by another worker while there is none. So it is if the worker of another role does.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.pool import EnginePool
from actors.rollout import PeerDied, RolloutRequest, RolloutSummary
from actors.session import ClusterError
from pipeline.core.agents.program import Program, Sampling, Task

OnDone = Callable[[RolloutSummary], None]
Sink = Callable[[Any], Awaitable[None]]
"""Takes the reference to a task's episodes; RayActorError means that the sink itself is gone."""

MIN_FOR_FAILURE_SHARE = 50
"""Episodes from which on the share of infrastructure failures can end a phase before all are sampled."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What is to be sampled.

    Attributes:
        samples: episodes per task.
        sampling: its seed is that of the run and the phase.
        max_failure_share: the phase ends with an error when a larger share of episodes fails for infrastructure
            reasons.
    """

    program: Program[Any]
    tasks: Sequence[Task]
    samples: int
    sampling: Sampling
    max_failure_share: float


async def run_phase(
    phase: Phase, pools: Mapping[str, EnginePool], sink: Sink, on_done: OnDone
) -> list[RolloutSummary]:
    """Serve all tasks; `sink` gets each one's episodes before `on_done` hears of it.

    Args:
        pools: the engines of each role. Programs run on the workers of the first.

    Raises:
        ClusterError: workers died too often, or too many episodes failed.
    """
    async with AsyncExitStack() as at_work:
        for pool in set(pools.values()):
            await at_work.enter_async_context(pool.at_work())
        return await _Run(phase, pools, sink, on_done).to_the_end()


class _Run:
    def __init__(self, phase: Phase, pools: Mapping[str, EnginePool], sink: Sink, on_done: OnDone) -> None:
        self.phase, self.pools, self.sink, self.on_done = phase, pools, sink, on_done
        self.home = next(iter(pools.values()))
        self.queue = deque(phase.tasks)
        self.summaries: list[RolloutSummary] = []

    async def to_the_end(self) -> list[RolloutSummary]:
        slots = math.ceil(self.home.rollout.concurrency / self.phase.samples) + 1
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(self.home.size):
                    for number in range(slots):
                        tasks.create_task(self._slot(index + number * self.home.size))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        self._check_failures()
        return self.summaries

    async def _slot(self, number: int) -> None:
        while self.queue:
            task = self.queue.popleft()
            while (summary := await self._serve(task, number)) is None:
                pass
            self.summaries.append(summary)
            self._check_failures(at_least=MIN_FOR_FAILURE_SHARE)
            self.on_done(summary)

    async def _serve(self, task: Task, slot: int) -> RolloutSummary | None:
        """One task, sampled and in the sink; None where a worker was lost on the way, and nothing is in the sink.

        Raises:
            ClusterError: the sink died.
        """
        worker = await self.home.worker_for(slot)
        peers = {role: await pool.worker_for(slot) for role, pool in self._others().items()}
        try:
            return await self._sample(task, worker, peers)
        except (RayActorError, ObjectLostError) as error:
            self.home.lost(worker, str(error))
        except PeerDied as died:
            self.pools[died.role].lost(peers[died.role], str(died))
        return None

    async def _sample(self, task: Task, worker: Any, peers: Mapping[str, Any]) -> RolloutSummary:
        """One task on these workers.

        Raises:
            RayActorError, ObjectLostError: the worker died, before or under the sink.
            PeerDied: that of another role did.
            ClusterError: the sink died.
        """
        request = RolloutRequest(
            task=task,
            program=self.phase.program,
            samples=self.phase.samples,
            sampling=self.phase.sampling,
            roles=tuple(role for role, pool in self.pools.items() if pool is self.home),
            peers={role: self.pools[role].peer(peer) for role, peer in peers.items()},
        )
        summary_ref, episodes_ref = worker.rollout.remote(request)
        try:
            summary: RolloutSummary = await summary_ref
        except RayTaskError as error:
            if isinstance(error.cause, PeerDied):
                raise error.cause from error
            raise
        try:
            await self.sink(episodes_ref)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise error.cause from error
            raise
        except RayActorError as error:
            raise ClusterError(f"the weighting actor died: {error}") from error
        return summary

    def _others(self) -> dict[str, EnginePool]:
        return {role: pool for role, pool in self.pools.items() if pool is not self.home}

    def _check_failures(self, at_least: int = 0) -> None:
        total = sum(s.episodes for s in self.summaries)
        failed = sum(s.infrastructure_failures for s in self.summaries)
        allowed = self.phase.max_failure_share
        if total >= at_least and failed > allowed * total:
            last = next(s.last_failure for s in reversed(self.summaries) if s.last_failure)
            raise ClusterError(
                f"{failed} of {total} trajectories failed for reasons outside of the model, more than "
                f"rollout.max_failure_share ({allowed:.0%}) allows; last: {last}"
            )
