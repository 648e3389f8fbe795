"""One phase of sampling: every task served exactly once, whatever dies meanwhile.

The driver moves references and small summaries, never episodes. A worker that joins takes tasks at once, one that is
to leave takes no more. If one dies or hangs, what it had in hand is sampled again by whoever is free; so it is if the
worker of another role does.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectLostError, RayTaskError

from actors import metrics
from actors.deaths import DEATHS, in_words
from actors.pool import EnginePool
from actors.rollout import PeerDied, RolloutRequest
from actors.session import ClusterError
from pipeline.core.agents.program import Program, Sampling, Task
from pipeline.core.shards import Counts

OnProgress = Callable[[int], None]
"""Told how many tasks are done, those of earlier processes included."""
Sink = Callable[[Task, Counts, Any], Awaitable[None]]
"""Takes a task, what was counted in its episodes, and the reference to them."""

MIN_FOR_FAILURE_SHARE = 50
"""Episodes from which on the share of infrastructure failures can end a phase before all are sampled."""


@dataclass(frozen=True, slots=True)
class Phase:
    """How tasks are sampled.

    Attributes:
        samples: episodes per task.
        sampling: its seed is that of the run and the phase.
        max_failure_share: the phase ends with an error when a larger share of episodes fails for infrastructure
            reasons.
        name: what it is called in metrics.
    """

    program: Program[Any]
    samples: int
    sampling: Sampling
    max_failure_share: float
    name: str = ""


class Work:
    """The tasks of a phase: to do, in hand, done; and what was counted in those that are done, each once.

    Args:
        tasks: to do.
        done, counts: of what was done before.
    """

    def __init__(self, tasks: Iterable[Task], *, done: int = 0, counts: Counts | None = None) -> None:
        self._queue = deque(tasks)
        self._in_hand = 0
        self._news = asyncio.Event()
        self.done, self.counts = done, counts or Counts()

    def states(self) -> dict[str, int]:
        """How many tasks wait, are in flight and are done."""
        return {"waiting": len(self._queue), "in_flight": self._in_hand, "done": self.done}

    async def take(self) -> Task | None:
        """The next task; None when all are done. Waits while those in hand may still send others back."""
        while not self._queue:
            if not self._in_hand:
                return None
            self._news.clear()
            await self._news.wait()
        self._in_hand += 1
        return self._queue.popleft()

    def finish(self, counts: Counts) -> None:
        """A task that was taken is done."""
        self._in_hand -= 1
        self.done += 1
        self.counts += counts
        if not self._in_hand:
            self._news.set()

    def give_back(self, task: Task) -> None:
        """A task that was taken is not done: somebody else must take it."""
        self._in_hand -= 1
        self._queue.appendleft(task)
        self._news.set()

    async def all_done(self) -> None:
        """Waits until nothing is to do or in hand."""
        while self._queue or self._in_hand:
            self._news.clear()
            await self._news.wait()

    def again(self, lost: Sequence[tuple[Task, Counts]]) -> None:
        """These were done, and are to do again."""
        for task, counts in reversed(lost):
            self._queue.appendleft(task)
            self.done -= 1
            self.counts -= counts
        self._news.set()


async def run_phase(
    phase: Phase, work: Work, pools: Mapping[str, EnginePool], sink: Sink, on_progress: OnProgress
) -> None:
    """Serve all tasks; `sink` gets each one's episodes before it counts as done.

    Args:
        pools: the engines of each role. Programs run on the workers of the first.

    Raises:
        ClusterError: workers died too often, or too many episodes failed.
    """
    async with AsyncExitStack() as at_work:
        for pool in set(pools.values()):
            await at_work.enter_async_context(pool.at_work())
        await _Run(phase, work, pools, sink, on_progress).to_the_end()


@dataclass
class _Crew:
    """A worker, and how many still take tasks for it."""

    worker: Any
    slots: int


class _Run:
    def __init__(
        self, phase: Phase, work: Work, pools: Mapping[str, EnginePool], sink: Sink, on_progress: OnProgress
    ) -> None:
        self.phase, self.work, self.pools, self.sink = phase, work, pools, sink
        self.on_progress = on_progress
        self.home = next(iter(pools.values()))

    async def to_the_end(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                hiring = tasks.create_task(self._hire(tasks))
                await self.work.all_done()
                hiring.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        self._check_failures()

    async def _hire(self, tasks: asyncio.TaskGroup) -> None:
        """Every worker, as it comes, takes so many tasks at once that its engine is never short of episodes."""
        at_once = math.ceil(self.home.agents_per_worker / self.phase.samples) + 1
        numbers = itertools.count()
        while True:
            crew = _Crew(await self.home.hired(), at_once)
            for _ in range(at_once):
                tasks.create_task(self._slot(crew, next(numbers)))

    async def _slot(self, crew: _Crew, number: int) -> None:
        while self.home.employs(crew.worker) and (task := await self.work.take()) is not None:
            # While it waited for work, its worker may have gone.
            counts = await self._serve(task, crew.worker, number) if self.home.employs(crew.worker) else None
            if counts is None:
                self.work.give_back(task)
                continue
            self.work.finish(counts)
            self._check_failures(at_least=MIN_FOR_FAILURE_SHARE)
            self.on_progress(self.work.done)
            self._count_tasks()
        crew.slots -= 1
        if not crew.slots:
            self.home.let_go(crew.worker)

    def _count_tasks(self) -> None:
        for state, number in self.work.states().items():
            metrics.TASKS.set(number, phase=self.phase.name, state=state)

    async def _serve(self, task: Task, worker: Any, slot: int) -> Counts | None:
        """One task, sampled and in the sink; None where a worker was lost on the way, and nothing is in the sink."""
        peers = {role: await pool.worker_for(slot) for role, pool in self._others().items()}
        try:
            return await self._sample(task, worker, peers)
        except (*DEATHS, ObjectLostError) as error:
            self.home.lost(worker, in_words(error))
        except PeerDied as died:
            self.pools[died.role].lost(peers[died.role], str(died))
        return None

    async def _sample(self, task: Task, worker: Any, peers: Mapping[str, Any]) -> Counts:
        """One task on these workers.

        Raises:
            *DEATHS, ObjectLostError: the worker died, before or under the sink.
            PeerDied: that of another role did.
        """
        request = RolloutRequest(
            task=task,
            program=self.phase.program,
            samples=self.phase.samples,
            sampling=self.phase.sampling,
            roles=tuple(role for role, pool in self.pools.items() if pool is self.home),
            peers={role: self.pools[role].peer(peer) for role, peer in peers.items()},
            phase=self.phase.name,
        )
        counts_ref, episodes_ref = worker.rollout.remote(request)
        try:
            counts: Counts = await counts_ref
        except RayTaskError as error:
            if isinstance(error.cause, PeerDied):
                raise error.cause from error
            raise
        try:
            await self.sink(task, counts, episodes_ref)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise error.cause from error
            raise
        return counts

    def _others(self) -> dict[str, EnginePool]:
        return {role: pool for role, pool in self.pools.items() if pool is not self.home}

    def _check_failures(self, at_least: int = 0) -> None:
        counts, allowed = self.work.counts, self.phase.max_failure_share
        if counts.episodes >= at_least and counts.exceed(allowed):
            raise ClusterError(
                f"{counts.infrastructure_failures} of {counts.episodes} trajectories failed for reasons outside of the "
                f"model, more than rollout.max_failure_share ({allowed:.0%}) allows; last: {counts.last_failure}"
            )
