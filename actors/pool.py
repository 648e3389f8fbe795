"""The engines of one policy: rollout workers that are started, replaced when they die, put to sleep and reloaded.

Guarantees:

- A worker that died is replaced by one that serves the same version, and it gets work only then.
- Every wait has a bound and says what it waited for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors.engine import EngineOptions
from actors.placement import PolicyPlacement
from actors.retriever import RetrieverClient
from actors.rollout import Peer, RolloutActor
from actors.session import ClusterError, wait_for
from actors.weight_transfer import EngineRef
from pipeline.core.config import ClusterConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot

logger = logging.getLogger(__name__)

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
        num_threads=max(1, len(os.sched_getaffinity(0)) // engines_per_node) if on_cpu else None,
        weight_transport=placement.transport,
        start_timeout_s=cluster.start_timeout_s,
        request_timeout_s=rollout.timeout_s,
        record_proposal=spec.records_proposal,
        sleeps=sleeps,
    )


class EnginePool:
    """One rollout worker per engine.

    Args:
        name: of the policy, for messages.
        options: of every engine; the model is that of `start`'s snapshot.
        rollout, cluster: sections of the configuration.
        placement: the bundle of each worker, and the GPUs that it takes of it.
        bundle_options: Ray options for an actor in a bundle.
        retriever: what programs retrieve with.
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
    ) -> None:
        self.name, self.options, self.rollout, self.cluster = name, options, rollout, cluster
        self.serving: int | None = None
        """The version that every engine serves; None while they sleep, or after a push that failed."""
        self.workers: list[Any] = []
        self._nodes: list[str] = []
        self._placement, self._bundle_options = placement, bundle_options
        self._retriever = retriever
        self._model = options.model
        self._version = 0

    # ---------------------------------------------------------------- up and down

    def start(self, snapshot: Snapshot) -> None:
        """Bring all workers up; they serve `snapshot`.

        Raises:
            ClusterError: they did not come up within `cluster.start_timeout_s`.
        """
        self._model, self._version = snapshot.model, snapshot.version
        self.workers = [self._new_worker(index) for index in range(self.rollout.workers)]
        seconds = self.cluster.start_timeout_s
        self._nodes = wait_for(
            [worker.start.remote(snapshot.version) for worker in self.workers],
            seconds,
            f"the vLLM engines of {self.name} to start (cluster.start_timeout_s)",
        )
        self.serving = snapshot.version

    def begin_phase(self) -> None:
        """Restarts are counted from here; call from the event loop that `replace` will run on."""
        self._restarts, self._replacing = 0, asyncio.Lock()

    async def replace(self, index: int, dead: Any, error: RayError) -> None:
        """Put a new worker, which serves the current version, in the place of a dead one; once, whoever notices first.

        Raises:
            ClusterError: workers died more often than `rollout.max_restarts`, or the new one did not start in time.
        """
        async with self._replacing:
            while self.workers[index] is dead:
                self._restarts += 1
                if self._restarts > self.rollout.max_restarts:
                    raise ClusterError(
                        f"rollout workers died {self._restarts} times in one phase (rollout.max_restarts: "
                        f"{self.rollout.max_restarts}); last: {error}"
                    ) from error
                logger.warning(f"rollout worker {index} of {self.name} died and is replaced: {error}")
                ray.kill(dead)  # it may only be out of reach; its share of the bundle is needed
                worker = self._new_worker(index)
                try:
                    self._nodes[index] = await self._start_in_time(worker)
                    self.workers[index] = worker
                except RayActorError as again:
                    error = again

    def close(self) -> None:
        """End all workers and their engines."""
        try:
            ray.get([worker.shutdown.remote() for worker in self.workers], timeout=30)
        except (RayActorError, GetTimeoutError) as error:
            logger.warning(f"an engine of {self.name} did not shut down by itself: {error}")
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self.serving = [], None

    # ---------------------------------------------------------------- what they serve

    def sleep(self) -> None:
        """Give the engines' GPU memory to others, until a push or `reload`."""
        if self.serving is not None:
            seconds = self.cluster.push_timeout_s
            calls = [worker.sleep.remote(seconds) for worker in self.workers]
            wait_for(calls, seconds, f"the engines of {self.name} to fall asleep (cluster.push_timeout_s)")
            self.serving = None

    def reload(self, snapshot: Snapshot) -> None:
        """Let the engines load a version from its model directory."""
        seconds = self.cluster.start_timeout_s
        self.serving = None
        calls = [worker.reload.remote(snapshot.model, snapshot.version, seconds) for worker in self.workers]
        wait_for(calls, seconds, f"engines to load {snapshot.model} (cluster.start_timeout_s)")
        self.now_serves(snapshot)

    def now_serves(self, snapshot: Snapshot) -> None:
        """All engines serve this version, by `reload` or by a push that they confirmed."""
        self._model, self._version = snapshot.model, snapshot.version
        self.serving = snapshot.version

    def search_with(self, retriever: RetrieverClient) -> None:
        """From now on programs retrieve there."""
        self._retriever = retriever
        calls = [worker.search_with.remote(retriever) for worker in self.workers]
        wait_for(calls, self.cluster.start_timeout_s, f"the workers of {self.name} to take a new retriever")

    def receivers(self) -> list[EngineRef]:
        """The engines as a push sees them."""
        size = self.rollout.tensor_parallel_size
        return [EngineRef(w, node, size) for w, node in zip(self.workers, self._nodes, strict=True)]

    def peer(self, number: int) -> Peer:
        """One of the workers, for a program that runs on another policy's."""
        worker = self.workers[number % len(self.workers)]
        return Peer(worker, replace(self.options, model=self._model), self._version)

    # ---------------------------------------------------------------- inside

    def _new_worker(self, index: int) -> Any:
        bundle = self._bundle_options(self._placement.engine_bundles[index], self._placement.engine_gpus)
        return RolloutActor.options(**bundle, max_concurrency=10_000).remote(
            replace(self.options, model=self._model), self._retriever, concurrency=self.rollout.concurrency
        )

    async def _start_in_time(self, worker: Any) -> str:
        seconds = self.cluster.start_timeout_s
        try:
            return str(await asyncio.wait_for(worker.start.remote(self._version), seconds))
        except TimeoutError as error:
            ray.kill(worker)
            raise ClusterError(
                f"waited {seconds:.0f} s for a new vLLM engine (cluster.start_timeout_s)"
            ) from error


def engines_per_node(workers: int) -> int:
    """Of so many engines, on the node that has most of them."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    return math.ceil(workers / nodes)
