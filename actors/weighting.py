"""The weighting actor: a question's K trajectories in, K weighted examples out; and the driver's end of it.

It works while rollouts go on, and does arithmetic only: what the engines had to score came with the episodes. Shards
are written as soon as all their tasks are in. What is in a shard depends only on the tasks, never on the order in which
they finish. Tasks that wait for others of their shard are written as soon as they are as many as a shard has, after a
minute, and when the phase is given up: little is lost with the actor, and nothing with a phase that ends in order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from actors import heartbeat, metrics
from actors.actor_log import Identity, introduce
from actors.deaths import DEATHS, in_words
from actors.heartbeat import Silent
from actors.observer import Observer
from actors.session import ClusterError
from pipeline.core.agents.program import Task
from pipeline.core.config import ClusterConfig
from pipeline.core.records import Episode
from pipeline.core.shards import Counts, Shards
from pipeline.core.weighing import Weigh, Weighted

if TYPE_CHECKING:
    from actors.sampling import Work

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 60.0
"""Tasks that wait are written with the first that is done so many seconds after the last write: what is lost with the
actor was done within that time of each other."""

ADDS_AT_ONCE = 8
"""Tasks on their way to the actor: enough that it need not wait for the next. Ray copies the episodes of every call
that waits to the actor's node, where those of all workers might not fit."""


class Weighting:
    """The actor class.

    Args:
        identity: under which it logs and counts.
    """

    def __init__(self, identity: Identity | None = None) -> None:
        introduce(identity)

    async def ping(self) -> None:
        """Answers between two tasks."""

    async def begin(self, shards: Shards, weigh: Weigh[Any]) -> None:
        """Start a phase, or go on with one.

        Args:
            shards: as `resume` has found them.
            weigh: what makes examples of a task's episodes.

        Raises:
            ValueError: the directories are not those of the outputs.
        """
        if set(shards.examples) != set(weigh.outputs):
            raise ValueError(f"{list(shards.examples)} are not {list(weigh.outputs)}")
        self._shards, self._weigh, self._complete = shards, weigh, set(shards.complete)
        self._tasks = {task.id: task for task in shards.tasks}
        self._waiting = shards.read_loose()
        """Tasks of shards that are not complete."""
        self._unwritten: set[str] = set()
        """Those of them that are nowhere else."""
        self._written_at = time.monotonic()
        logger.info(
            f"{shards.rollouts}: {len(self._complete)} of {len(shards)} shards are complete, "
            f"{len(self._waiting)} tasks of others are written"
        )
        for shard in sorted({shards.shard_of(self._tasks[task_id]) for task_id in self._waiting}):
            self._write_if_complete(shard)

    async def add(self, episodes: Sequence[Episode]) -> bool:
        """One task's episodes. Either all of it is kept or, on failure, nothing.

        Returns:
            whether the shard of the task is complete now. Until then it may be lost if this actor dies.
        """
        task = self._tasks[episodes[0].task_id]
        shard = self._shards.shard_of(task)
        if shard not in self._complete:
            weighted = self._weigh(task, episodes)
            self._waiting[task.id] = (episodes, weighted)
            self._unwritten.add(task.id)
            _count(episodes, weighted)
            self._write_if_complete(shard)
            is_due = time.monotonic() - self._written_at >= WRITE_EVERY_S
            if is_due or len(self._unwritten) >= self._shards.tasks_per_shard:
                await self.write_waiting()
        return shard in self._complete

    async def write_waiting(self) -> None:
        """Write the tasks that are nowhere else."""
        if self._unwritten:
            self._shards.write_loose({task_id: self._waiting[task_id] for task_id in sorted(self._unwritten)})
            self._unwritten.clear()
        self._written_at = time.monotonic()

    async def finish(self) -> dict[str, Any]:
        """What `weigh` says of the whole phase.

        Raises:
            RuntimeError: tasks are missing, or nothing can be trained on.
        """
        missing = [n for n in range(len(self._shards)) if n not in self._complete]
        if missing:
            number = sum(len(self._shards.members(shard)) for shard in missing)
            raise RuntimeError(
                f"the phase is not complete: {number} of {len(self._shards.tasks)} tasks are missing"
            )
        return dict(self._weigh.summarise(self._shards.statistics()))

    def _write_if_complete(self, shard: int) -> None:
        members = [task.id for task in self._shards.members(shard)]
        if not all(member in self._waiting for member in members):
            return
        began = time.perf_counter()
        self._shards.write(shard, [self._waiting[member] for member in members])
        seconds = time.perf_counter() - began
        metrics.SHARDS.add()
        metrics.SHARD_SECONDS.add(seconds)
        logger.info(f"wrote shard {shard} of {len(self._shards)}, {len(members)} tasks, in {seconds:.2f} s")
        self._complete.add(shard)
        for member in members:
            del self._waiting[member]
        self._unwritten.difference_update(members)
        self._shards.remove_loose(self._waiting)


def _count(episodes: Sequence[Episode], weighted: Weighted) -> None:
    metrics.WEIGHED.add(len(episodes))
    metrics.EXCLUDED.add(sum(e.failure is not None for e in episodes), reason="infrastructure")
    for reason in ("too_long_to_score", "nothing_to_compare"):
        metrics.EXCLUDED.add(weighted.statistics.get(reason, 0), reason=reason)


WeightingActor = ray.remote(Weighting)


class ShardSink:
    """The driver's end of the weighting actor: where the episodes of a phase go that become shards.

    One actor serves a phase after the other; phases that overlap have a sink and an actor each. If it dies or hangs,
    another one takes its place: complete shards stay, and tasks of others are queued again, so that each is counted
    once.

    Args:
        cluster: how long to wait for an actor to begin a phase, and for a sign of life.
        observer: of the run.
        number: among the weighting actors.
    """

    def __init__(self, cluster: ClusterConfig, observer: Observer | None = None, *, number: int = 0) -> None:
        self._observer, self._number = observer or Observer(), number
        self._start_timeout_s = cluster.start_timeout_s
        self._heartbeat_timeout_s = cluster.heartbeat_timeout_s
        self._actor = _new_actor(self._observer, self._number)
        self._is_up = False  # it has begun a phase, and so has no need of time to start

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    @asynccontextmanager
    async def at_work(
        self, shards: Shards, weigh: Weigh[Any], work: Work, *, max_restarts: int
    ) -> AsyncIterator[None]:
        """A phase; the actor is watched meanwhile.

        Args:
            work: its tasks; what is lost goes back there.
            max_restarts: so often the actor may die or hang in this phase.

        Raises:
            ClusterError: it did so more often.
        """
        self._shards, self._weigh, self._work = shards, weigh, work
        self._deaths, self._max_restarts = 0, max_restarts
        self._replacing, self._adding = asyncio.Lock(), asyncio.Semaphore(ADDS_AT_ONCE)
        self._in_memory: dict[int, dict[str, tuple[Task, Counts]]] = {}
        """By shard that is not complete, the tasks that the actor has."""
        actor = self._actor
        try:
            if self._is_up:
                await self._answer_of(actor)
            await self._begin(actor)
        except (Silent, *DEATHS) as error:
            await self._replace(actor, in_words(error))
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch())
                yield
                watch.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            await self._write_waiting()

    async def __call__(self, task: Task, counts: Counts, episodes: Any) -> None:
        """Take the reference to a task's episodes.

        Raises:
            ClusterError: the actor died too often.
            RayTaskError: the episodes are lost, or cannot be weighed.
        """
        while True:
            async with self._adding:
                actor, deaths = self._actor, self._deaths
                try:
                    is_complete = await actor.add.remote(episodes)
                except DEATHS as error:
                    await self._replace(actor, in_words(error))
                    continue
            if deaths == self._deaths:
                break
            # Else the actor that took them has died since: they go to the next one.
        shard = self._shards.shard_of(task)
        if is_complete:
            self._in_memory.pop(shard, None)
        else:
            self._in_memory.setdefault(shard, {})[task.id] = (task, counts)

    async def finish(self) -> Mapping[str, Any]:
        """What `weigh` says of the whole phase; see `Weighting.finish`.

        Raises:
            ClusterError: the actor died or hung too often.
        """
        while True:
            actor = self._actor
            try:
                statistics: Mapping[str, Any] = await actor.finish.remote()
                return statistics
            except DEATHS as error:
                await self._replace(actor, in_words(error))

    async def _write_waiting(self) -> None:
        """Whatever ends a phase, an interrupt or an error: what is done is written."""
        if not any(self._in_memory.values()):
            return
        try:
            written = self._actor.write_waiting.remote()
            await heartbeat.answer(written, self._heartbeat_timeout_s, "cluster.heartbeat_timeout_s")
        except (Silent, RayError) as error:
            logger.warning(
                f"tasks that are done could not be written and are sampled again: {in_words(error)}"
            )

    async def _watch(self) -> None:
        """Replace an actor that does not answer within `cluster.heartbeat_timeout_s`."""
        while True:
            await asyncio.sleep(self._heartbeat_timeout_s / 4)
            actor = self._actor
            try:
                await self._answer_of(actor)
            except (Silent, RayError) as error:
                await self._replace(actor, in_words(error))

    async def _answer_of(self, actor: Any) -> None:
        await heartbeat.answer(actor.ping.remote(), self._heartbeat_timeout_s, "cluster.heartbeat_timeout_s")

    async def _begin(self, actor: Any) -> None:
        begun = actor.begin.remote(self._shards, self._weigh)
        await heartbeat.answer(begun, self._start_timeout_s, "cluster.start_timeout_s")
        if not self._is_up:
            self._is_up = True
            self._observer.is_up("weighting", number=self._number)

    async def _replace(self, dead: Any, cause: str) -> None:
        """Put a new actor in the place of a lost one; once, whoever notices first."""
        async with self._replacing:
            while self._actor is dead:
                self._deaths += 1
                # Also where it hangs or is only out of reach: it must not write any more.
                ray.kill(dead)
                self._observer.lost("weighting")
                if self._deaths > self._max_restarts:
                    raise ClusterError(
                        f"the weighting actor was lost {self._deaths} times in one phase (rollout.max_restarts: "
                        f"{self._max_restarts}); last: {cause}"
                    )
                await self._queue_lost(cause)
                new, self._is_up = _new_actor(self._observer, self._number), False
                try:
                    await self._begin(new)
                except (Silent, *DEATHS) as error:
                    cause = in_words(error)
                    ray.kill(new)
                    continue
                self._actor = new
                self._observer.restarted("weighting")

    async def _queue_lost(self, cause: str) -> None:
        await asyncio.to_thread(self._shards.resume)
        lost = [
            taken
            for shard, members in self._in_memory.items()
            if shard not in self._shards.complete
            for task_id, taken in members.items()
            if task_id not in self._shards.loose
        ]
        self._in_memory.clear()
        self._work.again(lost)
        logger.warning(
            f"the weighting actor is lost and replaced ({cause}); {len(self._shards.complete)} of {len(self._shards)} "
            f"shards are complete; of others {len(self._shards.loose)} tasks are written and {len(lost)} sampled again"
        )


def _new_actor(observer: Observer, number: int) -> Any:
    return WeightingActor.options(num_cpus=0).remote(observer.identity("weighting", number=number))
