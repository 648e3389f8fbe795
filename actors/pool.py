"""The engines of one policy: rollout workers that are started, watched, replaced, put to sleep and reloaded.

A pool starts with `rollout.workers`, in bundles that are held for them, and grows to `rollout.max_workers`. Those
beyond the bundles are pending Ray actors until there is room: Ray's autoscaler takes that as a reason to add nodes.

Guarantees:

- A worker that died, hangs or missed a version is ended, and never serves again. At work it is replaced by one that
  loads the current version from its model directory, and that gets work only then.
- A worker on a node that is to leave gets no more work, and ends when it has done what it has.
- The others go on meanwhile, and to the end where it cannot be replaced: as long as `rollout.min_workers` are left.
- Every wait that work depends on has a bound and says what it waited for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.deaths import in_words
from actors.engine_options import MOST_AGENTS, EngineOptions, in_flight
from actors.engine_use import EngineUse
from actors.hands import Hands
from actors.observer import Observer
from actors.placement import PolicyPlacement
from actors.retriever import RetrieverClient
from actors.rollout import Peer, RolloutActor
from actors.seats import Newcomer, Seat
from actors.session import ClusterError, outcomes, resources_in_words
from actors.shift import Shift
from actors.weight_transfer import EngineRef
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot

logger = logging.getLogger(__name__)

Room = Callable[[int | None, float], dict[str, Any]]
"""(number of a bundle, share of its GPUs) -> Ray options of an actor that is to live there; without a number (None) it
lives wherever so many GPUs are free."""


def engine_options(
    spec: PolicySpec,
    placement: PolicyPlacement,
    cluster: ClusterConfig,
    *,
    on_cpu: bool,
    engines_per_node: int,
    sleeps: bool,
) -> EngineOptions:
    """How the engines of a policy are built."""
    rollout = spec.rollout
    assert rollout is not None
    return EngineOptions(
        model=spec.model.path,
        dtype=rollout.dtype,
        tensor_parallel_size=rollout.tensor_parallel_size,
        max_model_len=spec.model.max_length,
        max_num_seqs=rollout.concurrency or MOST_AGENTS["cpu" if on_cpu else "gpu"],
        gpu_memory_utilization=placement.gpu_memory_utilization,
        kv_cache_gib=rollout.kv_cache_gib,
        enforce_eager=rollout.enforce_eager or on_cpu,
        engines_per_node=engines_per_node if on_cpu else None,
        weight_transport=placement.transport,
        start_timeout_s=cluster.start_timeout_s,
        request_timeout_s=rollout.timeout_s,
        record_proposal=spec.records_proposal,
        sleeps=sleeps,
    )


@dataclass(eq=False)
class _AtWork:
    """A shift, and how many phases share it."""

    shift: Shift
    phases: int = 0
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    working: asyncio.Task[None] = field(init=False)


class EnginePool:
    """One rollout worker per engine.

    Args:
        name: of the policy, for messages.
        options: of every engine; the model is that of `start`'s snapshot.
        rollout, cluster: sections of the configuration.
        placement: the bundle of each worker, and the GPUs that it takes of it.
        room: Ray options for an actor in a bundle, or in none.
        retriever: what programs retrieve with.
        observer: of the run.
    """

    def __init__(
        self,
        name: str,
        options: EngineOptions,
        rollout: RolloutConfig,
        cluster: ClusterConfig,
        placement: PolicyPlacement,
        room: Room,
        retriever: RetrieverClient,
        observer: Observer | None = None,
    ) -> None:
        self.name, self.options, self.rollout, self.cluster = name, options, rollout, cluster
        self.serving: int | None = None
        """The version that every engine serves; None while they sleep, or after a push that failed."""
        self.agents_per_worker = rollout.concurrency or 1
        """In flight at once; of workers that have started."""
        self._seats: list[Seat] = []
        self._placement, self._room = placement, room
        self._retriever, self._observer = retriever, observer or Observer()
        self._missing = 0
        """Workers that were lost and in whose place none has come yet."""
        self._model = options.model
        self._version = 0
        self._now: _AtWork | None = None
        """None while the pool is not at work."""

    # ---------------------------------------------------------------- up and down

    def start(self, snapshot: Snapshot) -> None:
        """Bring `rollout.workers` up; they serve `snapshot`. Those that fail to start come later, at work.

        Raises:
            ClusterError: fewer than `rollout.min_workers` came up within `cluster.start_timeout_s`.
        """
        self._model, self._version = snapshot.model, snapshot.version
        self._seats = [Seat(index) for index in range(self.rollout.most_workers)]
        seats = self._seats[: len(self._placement.engine_bundles)]
        for seat in seats:
            seat.worker = self._new_worker(seat.index)
        calls = [seat.worker.where.remote() for seat in seats]
        calls += [seat.worker.start.remote(snapshot.model, snapshot.version) for seat in seats]
        answers = outcomes(calls, self.cluster.start_timeout_s)
        for seat, node in zip(seats, answers, strict=False):
            seat.node = str(node)
        starts = list(zip(seats, answers[len(seats) :], strict=True))
        failures = [(seat, answer) for seat, answer in starts if isinstance(answer, RayError)]
        if len(seats) - len(failures) < self.rollout.min_workers:
            self._give_up_the_start([failure for _, failure in failures])
        for seat, failure in failures:
            self.lost(seat.worker, f"its engine did not start: {in_words(failure)}")
        self._agree_on_agents(min(answer for _, answer in starts if not isinstance(answer, RayError)))
        for seat in self._present():
            self._observer.is_up("rollout", self.name, seat.index)
        self.serving = snapshot.version

    def _agree_on_agents(self, fit: int) -> None:
        wanted = self.rollout.concurrency
        self.agents_per_worker = in_flight(wanted, fit, self.options.max_num_seqs)
        if wanted is not None and wanted > fit:
            logger.warning(
                f"the KV cache of an engine of {self.name} holds {fit} agents of half of model.max_length, fewer than "
                f"rollout.concurrency: {wanted}. If they are as long on average, what an agent has read is computed "
                "again in its next turn; leave the key out, and as many are in flight as fit"
            )

    def _give_up_the_start(self, failures: Sequence[RayError]) -> None:
        for failure in failures:
            if not isinstance(failure, GetTimeoutError):
                raise ClusterError(
                    f"an engine of {self.name} did not start: {in_words(failure)}"
                ) from failure
        raise ClusterError(
            f"waited {self.cluster.start_timeout_s:.0f} s for the vLLM engines of {self.name} to start "
            f"(cluster.start_timeout_s); the cluster has {resources_in_words()}"
        )

    def close(self) -> None:
        """End all workers and their engines."""
        workers = [seat.worker for seat in self._present()]
        for failure in outcomes([worker.shutdown.remote() for worker in workers], 30):
            if isinstance(failure, RayError):
                logger.warning(f"an engine of {self.name} did not shut down by itself: {in_words(failure)}")
        for worker in workers:
            ray.kill(worker)
        for seat in self._seats:
            seat.send_away()
        self._seats, self.serving = [], None

    # ---------------------------------------------------------------- at work

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Workers are watched meanwhile. Those that are away, or go away, are replaced while the others go on.

        Phases that overlap share the workers, and failures are counted from the beginning of the first. A worker that
        is not up when the work ends is waited for the next time; where a learner needs the memory until then it is
        ended, and the next time starts another.

        Raises:
            ClusterError: fewer than `rollout.min_workers` are left, after more than `rollout.max_restarts` failures or
                without room for others.
        """
        if self._now is None:
            self._now = _AtWork(
                Shift(
                    self.name,
                    self.rollout,
                    self.cluster,
                    self._seats,
                    self.agents_per_worker,
                    self._ask_for,
                    self._bring_up,
                    self.lost,
                )
            )
            self._now.working = asyncio.create_task(self._work(self._now))
            await self._now.has_begun.wait()
        now = self._now
        now.phases += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(_as_long_as(now.working))
                yield
                watch.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            now.phases -= 1
            if not now.phases:
                now.is_over.set()
                await asyncio.wait([now.working])

    async def _work(self, now: _AtWork) -> None:
        try:
            async with now.shift.on():
                now.has_begun.set()
                await now.is_over.wait()
        finally:
            self._now = None
            if self.options.sleeps:
                for seat in self._seats:
                    seat.send_away()

    @property
    def hands(self) -> Hands:
        """Who gets the next task. Of this and the next: while the pool is at work only."""
        return self._at_work.hands

    async def worker_for(self, number: int) -> Any:
        """One of the workers; numbers are spread over them. Waits while all are away."""
        return await self._at_work.worker_for(number)

    def peer(self, worker: Any) -> Peer:
        """One of the workers, for a program that runs on another policy's."""
        return Peer(worker, replace(self.options, model=self._model), self._version)

    def lost(self, worker: Any, cause: str) -> None:
        """That worker died, hangs or missed something: it is ended for good, and at work another takes its place.

        Whoever notices first says so; later calls do nothing.
        """
        for seat in self._present():
            if seat.worker is worker:
                logger.warning(
                    f"rollout worker {seat.index} of {self.name} is lost and will be replaced: {cause}"
                )
                # Also where it only hangs or is out of reach: it must not answer later, and its memory is needed.
                # Ray kills a process that does not react; its engine's processes end with it (vllm_plugin).
                ray.kill(worker)
                seat.worker = None
                self._observer.lost("rollout", self.name)
                self._missing += 1
                if self._now is not None:
                    self._now.shift.replace(seat, cause)
        if self._now is not None:
            self._now.shift.let_go(worker)

    # ---------------------------------------------------------------- what they serve

    def must_be_idle(self, why: str) -> None:
        """
        Raises:
            ClusterError: a phase that has not ended is at work with them.
        """
        if self._now is not None:
            raise ClusterError(
                f"the engines of {self.name} are sampling with version {self._version}; they must end that first {why}"
            )

    def sleep(self) -> None:
        """Give the engines' GPU memory to others, until a push or `reload`."""
        if self.serving is not None:
            seconds = self.cluster.push_timeout_s
            self._all("sleep", seconds, timeout_s=seconds)
            self.serving = None

    def reload(self, snapshot: Snapshot) -> None:
        """Let the engines load a version from its model directory; one that fails to is lost."""
        seconds = self.cluster.start_timeout_s
        self.serving = None
        self._all("reload", snapshot.model, snapshot.version, seconds, timeout_s=seconds)
        self.now_serves(snapshot)

    def now_serves(self, snapshot: Snapshot) -> None:
        """All engines serve this version, by `reload` or by a push that they confirmed; so will replacements."""
        self._model, self._version = snapshot.model, snapshot.version
        self.serving = snapshot.version

    def search_with(self, retriever: RetrieverClient) -> None:
        """From now on programs retrieve there."""
        self._retriever = retriever
        self._all("search_with", retriever, timeout_s=self.cluster.start_timeout_s)

    def lose_silent(self) -> None:
        """Lose the workers that died or hang, before something that would wait for them."""
        self._all("ping", timeout_s=self.cluster.heartbeat_timeout_s)

    def uses(self) -> dict[Any, EngineUse]:
        """What each worker's engine did since its start; of those that answer."""
        workers = [seat.worker for seat in self._present()]
        answers = outcomes([worker.use.remote() for worker in workers], self.cluster.heartbeat_timeout_s)
        return {
            worker: answer
            for worker, answer in zip(workers, answers, strict=True)
            if isinstance(answer, EngineUse)
        }

    @property
    def in_flight(self) -> int:
        """Episodes at once, of all workers that are there."""
        return self.agents_per_worker * len(self._present())

    def store_bytes(self) -> float:
        """Of Ray's object stores on the nodes where workers are, together; without end if Ray does not say."""
        ours = {seat.node for seat in self._present()}
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in ours]
        return sum(node["Resources"].get("object_store_memory", 0.0) for node in nodes) or math.inf

    def receivers(self) -> list[EngineRef]:
        """The engines as a push sees them."""
        size = self.rollout.tensor_parallel_size
        return [EngineRef(seat.worker, seat.node, size) for seat in self._present()]

    # ---------------------------------------------------------------- inside

    def _present(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.worker is not None]

    def _all(self, method: str, *arguments: Any, timeout_s: float) -> None:
        """Call every worker, and lose those that fail or do not answer in time."""
        workers = [seat.worker for seat in self._present()]
        calls = [getattr(worker, method).remote(*arguments) for worker in workers]
        for worker, outcome in zip(workers, outcomes(calls, timeout_s), strict=True):
            if isinstance(outcome, GetTimeoutError):
                self.lost(worker, f"it did not end {method} within {timeout_s:g} s")
            elif isinstance(outcome, RayError):
                self.lost(worker, f"{method} failed: {in_words(outcome)}")

    @property
    def _at_work(self) -> Shift:
        assert self._now is not None, "the pool is not at work"
        return self._now.shift

    def _ask_for(self, index: int) -> Newcomer:
        return Newcomer(self._new_worker(index), self._retriever)

    async def _bring_up(self, newcomer: Newcomer) -> None:
        await newcomer.serves(self._model, self._version, self._retriever, self.cluster.start_timeout_s)
        if self._missing:
            self._missing -= 1
            self._observer.restarted("rollout", self.name)

    def _new_worker(self, index: int) -> Any:
        """In its bundle; beyond those, wherever there is room."""
        where, bundles = self._placement, self._placement.engine_bundles
        if index < len(bundles):
            options = self._room(bundles[index], where.engine_gpus)
        else:
            options = self._room(None, where.joiner_gpus)
        return RolloutActor.options(**options, max_concurrency=10_000).remote(
            self.options,
            self._retriever,
            concurrency=self.rollout.concurrency,
            identity=self._observer.identity("rollout", self.name, index),
        )


async def _as_long_as(working: asyncio.Task[None]) -> None:
    """Raises what ends it early. Whoever stops waiting does not end it."""
    await asyncio.shield(working)


def engines_per_node(workers: int) -> int:
    """Of so many engines, on the node that has most of them. Nodes without CPUs, such as a head, have none."""
    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    return math.ceil(workers / max(1, nodes))
