"""One phase of sampling: every task served exactly once, whatever dies meanwhile.

The driver moves references and small summaries, never episodes. Phases that overlap share the workers. A worker that
joins gets tasks at once, one that is to leave gets no more (`actors.hands`). If one dies or hangs, what it had in hand
is sampled again by whoever has room; so it is if the worker of another role does.
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
from actors.hands import Hand
from actors.memory import Memory
from actors.pool import EnginePool
from actors.rollout import PeerDied, Receipt, RolloutRequest
from actors.session import ClusterError
from pipeline.core.agents.program import Further, Program, Sampling, Task
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
        further: how many more of a task, given these; they are sampled by the same worker.
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
    further: Further | None = None

    @property
    def most_samples(self) -> int:
        """Episodes of a task, at most."""
        return self.samples + (self.further.most if self.further is not None else 0)


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
    phase: Phase,
    work: Work,
    pools: Mapping[str, EnginePool],
    sink: Sink,
    on_progress: OnProgress,
    memory: Memory | None = None,
) -> None:
    """Serve all tasks; `sink` gets each one's episodes before it counts as done.

    Args:
        pools: the engines of each role. Programs run on the workers of the first.
        memory: room for episodes until the sink has taken them, which phases may share; None: without end.

    Raises:
        ClusterError: workers died too often, or too many episodes failed.
    """
    async with AsyncExitStack() as at_work:
        for pool in set(pools.values()):
            await at_work.enter_async_context(pool.at_work())
        await _Run(phase, work, pools, sink, on_progress, memory).to_the_end()


class _Run:
    def __init__(
        self,
        phase: Phase,
        work: Work,
        pools: Mapping[str, EnginePool],
        sink: Sink,
        on_progress: OnProgress,
        memory: Memory | None,
    ) -> None:
        self.phase, self.work, self.pools, self.sink = phase, work, pools, sink
        self.on_progress = on_progress
        self.home = next(iter(pools.values()))
        self.hands, self.memory = self.home.hands, memory or Memory(math.inf, 0)

    async def to_the_end(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                giving = tasks.create_task(self._dispatch(tasks))
                await self.work.all_done()
                giving.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        self._check_failures()

    async def _dispatch(self, tasks: asyncio.TaskGroup) -> None:
        """Every task, as long as there are any, to whoever has room."""
        for number in itertools.count():
            if (task := await self.work.take()) is None:
                return
            await self.memory.reserve(self.phase.most_samples)
            try:
                hand = await self.hands.take(self.phase.most_samples)
            except asyncio.CancelledError:
                self.memory.release(self.phase.most_samples)
                raise
            tasks.create_task(self._do(task, hand, number))

    async def _do(self, task: Task, hand: Hand, number: int) -> None:
        try:
            counts = await self._serve(task, hand, number)
        finally:
            # Other phases go on, also where this one is given up.
            self.hands.put_down(hand, self.phase.most_samples)
            self.memory.release(self.phase.most_samples)
        if counts is None:
            self.work.give_back(task)
            return
        self.work.finish(counts)
        self._check_failures(at_least=MIN_FOR_FAILURE_SHARE)
        self.on_progress(self.work.done)
        self._count_tasks()

    def _count_tasks(self) -> None:
        for state, number in self.work.states().items():
            metrics.TASKS.set(number, phase=self.phase.name, state=state)

    async def _serve(self, task: Task, hand: Hand, number: int) -> Counts | None:
        """One task, sampled and in the sink; None where a worker was lost on the way, and nothing is in the sink."""
        peers = {role: await pool.worker_for(number) for role, pool in self._others().items()}
        try:
            return await self._sample(task, hand, peers)
        except (*DEATHS, ObjectLostError) as error:
            self.home.lost(hand.worker, in_words(error))
        except PeerDied as died:
            self.pools[died.role].lost(peers[died.role], str(died))
        return None

    async def _sample(self, task: Task, hand: Hand, peers: Mapping[str, Any]) -> Counts:
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
            further=self.phase.further,
        )
        receipt_ref, episodes_ref = hand.worker.rollout.remote(request)
        self.hands.sent(hand)
        try:
            receipt: Receipt = await receipt_ref
        except RayTaskError as error:
            if isinstance(error.cause, PeerDied):
                raise error.cause from error
            raise
        self.memory.learn(receipt.counts.episodes, receipt.size)
        try:
            await self.sink(task, receipt.counts, episodes_ref)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise error.cause from error
            raise
        return receipt.counts

    def _others(self) -> dict[str, EnginePool]:
        return {role: pool for role, pool in self.pools.items() if pool is not self.home}

    def _check_failures(self, at_least: int = 0) -> None:
        counts, allowed = self.work.counts, self.phase.max_failure_share
        if counts.episodes >= at_least and counts.exceed(allowed):
            raise ClusterError(
                f"{counts.infrastructure_failures} of {counts.episodes} trajectories failed for reasons outside of the "
                f"model, more than rollout.max_failure_share ({allowed:.0%}) allows; last: {counts.last_failure}"
            )
