"""The engines of one policy: rollout workers that are started, watched, replaced, put to sleep and reloaded.

Guarantees:

- A worker that died, hangs or missed a version is ended, and never serves again. At work it is replaced by one that
  loads the current version from its model directory, and that gets work only then.
- The others go on meanwhile, and to the end where it cannot be replaced: as long as `rollout.min_workers` are left.
- Every wait has a bound and says what it waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors import heartbeat
from actors.engine import EngineOptions
from actors.heartbeat import Silent, in_words
from actors.observer import Observer
from actors.placement import PolicyPlacement
from actors.retriever import RetrieverClient
from actors.rollout import Peer, RolloutActor
from actors.session import ClusterError, wait_for
from actors.weight_transfer import EngineRef
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot
from retriever_service.backoff import Backoff
from retriever_service.machine import available_cores

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 2.0
"""Mean pause before a worker whose replacement did not start is replaced a second time, in seconds; it doubles."""

BundleOptions = Callable[[int, float], dict[str, Any]]
"""(number of a bundle, share of its GPUs) -> options of an actor that is to live there."""


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
        max_num_seqs=rollout.concurrency,
        gpu_memory_utilization=placement.gpu_memory_utilization,
        kv_cache_gib=rollout.kv_cache_gib,
        enforce_eager=rollout.enforce_eager or on_cpu,
        # Nodes are taken to be like the driver's.
        num_threads=max(1, available_cores() // engines_per_node) if on_cpu else None,
        weight_transport=placement.transport,
        start_timeout_s=cluster.start_timeout_s,
        request_timeout_s=rollout.timeout_s,
        record_proposal=spec.records_proposal,
        sleeps=sleeps,
    )


@dataclass
class _Seat:
    """The place of one worker. While it is away (None) the others do its work."""

    worker: Any
    node: str = ""


class EnginePool:
    """One rollout worker per engine.

    Args:
        name: of the policy, for messages.
        options: of every engine; the model is that of `start`'s snapshot.
        rollout, cluster: sections of the configuration.
        placement: the bundle of each worker, and the GPUs that it takes of it.
        bundle_options: Ray options for an actor in a bundle.
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
        bundle_options: BundleOptions,
        retriever: RetrieverClient,
        observer: Observer | None = None,
    ) -> None:
        self.name, self.options, self.rollout, self.cluster = name, options, rollout, cluster
        self.serving: int | None = None
        """The version that every engine serves; None while they sleep, or after a push that failed."""
        self._seats: list[_Seat] = []
        self._placement, self._bundle_options = placement, bundle_options
        self._retriever, self._observer = retriever, observer or Observer()
        self._model = options.model
        self._version = 0
        self._backoff = Backoff(RESTART_PAUSE_S)
        self._tasks: asyncio.TaskGroup | None = None
        """Of heartbeats and replacements; None while the pool is not at work."""

    @property
    def size(self) -> int:
        """Number of workers, those that are away included."""
        return len(self._seats)

    # ---------------------------------------------------------------- up and down

    def start(self, snapshot: Snapshot) -> None:
        """Bring all workers up; they serve `snapshot`.

        Raises:
            ClusterError: they did not come up within `cluster.start_timeout_s`.
        """
        self._model, self._version = snapshot.model, snapshot.version
        self._seats = [_Seat(self._new_worker(index)) for index in range(self.rollout.workers)]
        nodes = wait_for(
            [seat.worker.start.remote(snapshot.version) for seat in self._seats],
            self.cluster.start_timeout_s,
            f"the vLLM engines of {self.name} to start (cluster.start_timeout_s)",
        )
        for seat, node in zip(self._seats, nodes, strict=True):
            seat.node = node
        self.serving = snapshot.version

    def close(self) -> None:
        """End all workers and their engines."""
        workers = [seat.worker for seat in self._present()]
        try:
            ray.get([worker.shutdown.remote() for worker in workers], timeout=30)
        except (RayActorError, GetTimeoutError) as error:
            logger.warning(f"an engine of {self.name} did not shut down by itself: {error}")
        for worker in workers:
            ray.kill(worker)
        self._seats, self.serving = [], None

    # ---------------------------------------------------------------- at work

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Workers are watched meanwhile, and those that are away, or go away, are replaced while the others go on.

        Failures are counted from here. A replacement that is not up when the work ends is given up: the next one starts
        another.

        Raises:
            ClusterError: fewer than `rollout.min_workers` are left, after more than `rollout.max_restarts` failures.
        """
        self._failures, self._arrival = 0, asyncio.Event()
        self._replacements: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                watches = [self._tasks.create_task(self._watch(seat)) for seat in self._seats]
                for index, seat in enumerate(self._seats):
                    if seat.worker is None:
                        self._bring(index, "it was lost before this phase")
                yield
                for task in (*watches, *self._replacements):
                    task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            self._tasks = None

    async def worker_for(self, slot: int) -> Any:
        """The worker of a slot: one and the same, unless that one is away. Waits while all are."""
        while True:
            if (own := self._seats[slot % self.size].worker) is not None:
                return own
            if present := self._present():
                return present[slot // self.size % len(present)].worker
            self._arrival.clear()
            await self._arrival.wait()

    def peer(self, worker: Any) -> Peer:
        """One of the workers, for a program that runs on another policy's."""
        return Peer(worker, replace(self.options, model=self._model), self._version)

    def lost(self, worker: Any, cause: str) -> None:
        """That worker died, hangs or missed something: it is ended for good, and at work another takes its place.

        Whoever notices first says so; later calls do nothing.
        """
        for index, seat in enumerate(self._seats):
            if seat.worker is worker:
                logger.warning(f"rollout worker {index} of {self.name} is lost and will be replaced: {cause}")
                # Also where it only hangs or is out of reach: it must not answer later, and its memory is needed.
                # Ray kills a process that does not react; its engine's processes end with it (vllm_plugin).
                ray.kill(worker)
                seat.worker = None
                self._observer.lost("rollout", self.name)
                if self._tasks is not None:
                    self._failures += 1
                    self._bring(index, cause)

    # ---------------------------------------------------------------- what they serve

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

    def receivers(self) -> list[EngineRef]:
        """The engines as a push sees them."""
        size = self.rollout.tensor_parallel_size
        return [EngineRef(seat.worker, seat.node, size) for seat in self._present()]

    # ---------------------------------------------------------------- inside

    def _present(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.worker is not None]

    def _all(self, method: str, *arguments: Any, timeout_s: float) -> None:
        """Call every worker, and lose those that fail or do not answer in time."""
        calls = {getattr(seat.worker, method).remote(*arguments): seat.worker for seat in self._present()}
        if not calls:
            return
        _, silent = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
        for call, worker in calls.items():
            if call in silent:
                self.lost(worker, f"it did not end {method} within {timeout_s:g} s")
                continue
            try:
                ray.get(call)
            except RayError as error:
                self.lost(worker, f"{method} failed: {in_words(error)}")

    async def _watch(self, seat: _Seat) -> None:
        """Lose whoever sits there and does not answer a ping within `cluster.heartbeat_timeout_s`."""
        limit = self.cluster.heartbeat_timeout_s
        while True:
            await asyncio.sleep(limit / 4)
            worker = seat.worker
            if worker is None:
                continue
            try:
                await heartbeat.answer(worker.ping.remote(), limit, "cluster.heartbeat_timeout_s")
            except (Silent, RayError) as error:
                self.lost(worker, in_words(error))

    def _bring(self, index: int, cause: str) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(self._replace(index, cause))
        self._replacements.add(task)
        task.add_done_callback(self._replacements.discard)

    async def _replace(self, index: int, cause: str) -> None:
        """Put a new worker that serves the current version onto an empty seat, or go on without.

        Raises:
            ClusterError: too many failures, and too few workers are left.
        """
        seat, seconds = self._seats[index], self.cluster.start_timeout_s
        for attempt in itertools.count():
            if self._failures > self.rollout.max_restarts:
                break
            await asyncio.sleep(self._backoff.pause_s(attempt))
            worker = self._new_worker(index)
            try:
                seat.node = await asyncio.wait_for(worker.start.remote(self._version), seconds)
                seat.worker = worker
            except TimeoutError:
                cause = f"a new engine did not start within {seconds:g} s (cluster.start_timeout_s)"
            except RayError as error:
                cause = f"a new engine did not start: {in_words(error)}"
            finally:
                if seat.worker is not worker:
                    ray.kill(worker)
            if seat.worker is worker:
                logger.warning(f"rollout worker {index} of {self.name} is back, with version {self._version}")
                self._observer.restarted("rollout", self.name)
                self._arrival.set()
                return
            self._failures += 1
            logger.warning(f"rollout worker {index} of {self.name}: {cause}")
        self._go_on_without(index, cause)

    def _go_on_without(self, index: int, cause: str) -> None:
        left = len(self._present()) + len(self._replacements) - 1
        what = (
            f"rollout workers of {self.name} failed {self._failures} times in one phase (rollout.max_restarts: "
            f"{self.rollout.max_restarts})"
        )
        if left < self.rollout.min_workers:
            raise ClusterError(
                f"{what}; {left} of {self.size} are left (rollout.min_workers: {self.rollout.min_workers}); "
                f"last: {cause}"
            )
        logger.warning(
            f"{what}; the phase goes on without worker {index}, with {left} of {self.size}; last: {cause}"
        )

    def _new_worker(self, index: int) -> Any:
        bundle = self._bundle_options(self._placement.engine_bundles[index], self._placement.engine_gpus)
        return RolloutActor.options(**bundle, max_concurrency=10_000).remote(
            replace(self.options, model=self._model),
            self._retriever,
            concurrency=self.rollout.concurrency,
            identity=self._observer.identity("rollout", self.name, index),
        )


def engines_per_node(workers: int) -> int:
    """Of so many engines, on the node that has most of them."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    return math.ceil(workers / nodes)
