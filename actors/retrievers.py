"""The retriever of a run: replicas of one index as actors, or the servers of `retriever.url`; and its re-indexing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import heartbeat
from actors.heartbeat import Silent
from actors.homes import homes, rooms
from actors.observer import Observer
from actors.retriever import ActorReplica, RetrieverActor, RetrieverClient, client_of, http_replicas
from actors.session import wait_for
from pipeline.core.config import RetrieverConfig
from pipeline.core.errors import UserError
from pipeline.core.retrieval import Searched, build_run_index
from retriever_service.encoding.encoder import EncoderSpec

logger = logging.getLogger(__name__)

MAX_RESTARTS = -1
"""Ray starts a dead replica again, however often; clients fail over meanwhile, or wait within their bounds."""


class Retrievers:
    """Starts them; await `wait` before use.

    Args:
        config: the `retriever` section.
        searched: a built index, for actors of the run's own; or servers, and there are no such actors.
        runtime_env: Ray environment of the actors.
        start_timeout_s: longest wait for an index to be opened, in seconds.
        engines: that compute on the CPUs of a replica's node, and share them with it.
        observer: of the run.
    """

    def __init__(
        self,
        config: RetrieverConfig,
        searched: Searched,
        *,
        runtime_env: dict[str, Any],
        start_timeout_s: float,
        engines: int = 0,
        observer: Observer | None = None,
    ) -> None:
        self.config, self._observer = config, observer or Observer()
        self._engines = engines
        self._runtime_env, self._start_timeout_s = runtime_env, start_timeout_s
        self._actors: list[Any] = []
        self._processes: dict[int, str] = {}
        """Of each replica, as it was seen last."""
        self._phases = 0
        """That are at work."""
        if isinstance(searched, Path):
            self._start(searched)
        else:
            self.client = client_of(http_replicas(searched.clients, config), config)

    client: RetrieverClient
    """What programs retrieve with; another one after `reindex`."""

    def wait(self) -> None:
        """Until every replica answers."""
        what = "retrievers to read their index (cluster.start_timeout_s)"
        wait_for([actor.ready.remote() for actor in self._actors], self._start_timeout_s, what)
        found = wait_for([actor.health.remote() for actor in self._actors], self._start_timeout_s, what)
        self._processes = {number: health.process for number, health in enumerate(found)}
        for number in self._processes:
            self._observer.is_up("retriever", number=number)

    def reindex(
        self,
        encoder: EncoderSpec,
        corpus: Sequence[str],
        at: Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Encode the corpus with another encoder and search that from now on; goes on with an index begun at `at`.

        The replicas of the old index end first: nothing is answered from it afterwards, and what they held is free.

        Raises:
            UserError: servers search for this run, and their index is not ours to change.
            RetrieverError: a mistake in the corpus or the encoder.
        """
        if not self._actors:
            raise UserError(
                "retriever.url: a run cannot change the index of servers; remove the key, so that it has its own"
            )
        self.close()
        build_run_index(self.config, corpus, at, encoder, on_progress)
        self._start(at)
        self.wait()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Replicas are watched meanwhile; one that hangs is started again. Its searches go to the others, or wait.

        Phases that overlap share the watch.
        """
        if not self._phases:
            self._watches = [asyncio.create_task(self._watch(number)) for number in range(len(self._actors))]
        self._phases += 1
        try:
            yield
        finally:
            self._phases -= 1
            if not self._phases:
                for watch in self._watches:
                    watch.cancel()
                await asyncio.gather(*self._watches, return_exceptions=True)

    async def _watch(self, number: int) -> None:
        """Start a replica again that answers nothing, or searches for one batch, for `retriever.timeout_s`."""
        limit, actor = self.config.timeout_s, self._actors[number]
        while True:
            await asyncio.sleep(limit / 4)
            try:
                health = await heartbeat.answer(actor.health.remote(), limit, "retriever.timeout_s")
            except RayError:
                continue  # it died, and Ray starts it again
            except Silent as silent:
                cause = str(silent)
            else:
                self._note_process(number, health.process)
                if health.in_hand_s <= limit:
                    continue
                cause = f"it has searched for one batch for {health.in_hand_s:.0f} s (retriever.timeout_s: {limit:g})"
            logger.warning(f"retriever replica {number} is started again: {cause}")
            ray.kill(actor, no_restart=False)

    def _note_process(self, number: int, process: str) -> None:
        """Ray starts dead replicas again without a word: it is seen by their being another process."""
        if self._processes.setdefault(number, process) != process:
            self._processes[number] = process
            logger.warning(f"retriever replica {number} is a new process: the one before was lost")
            self._observer.lost("retriever")
            self._observer.restarted("retriever")

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _start(self, index: Path) -> None:
        where = homes(self.config.replicas, self.config.gpus_per_replica, rooms())
        self._actors = [
            self._new_actor(index, number, home, where.count(home)) for number, home in enumerate(where)
        ]
        self.client = client_of(
            [ActorReplica(actor, self.config.options) for actor in self._actors], self.config
        )

    def _new_actor(self, index: Path, number: int, home: str, on_node: int) -> Any:
        """On that node, or elsewhere once that has gone. With GPUs Ray looks for free ones, and `home` is a guess."""
        config = self.config
        there = NodeAffinitySchedulingStrategy(home, soft=True)
        return RetrieverActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            memory=1,  # where nothing at all is asked for Ray takes any node
            num_gpus=config.gpus_per_replica,
            runtime_env=self._runtime_env,
            scheduling_strategy="SPREAD" if config.gpus_per_replica else there,
            max_restarts=MAX_RESTARTS,
        ).remote(
            str(index),
            device=config.torch_device,
            num_threads=config.threads_per_replica,
            sharers=on_node + self._engines,
            local_copy=config.local_copy,
            max_batch=config.max_batch,
            wait_s=config.batch_wait_s,
            search_parameters=config.search_parameters,
            identity=self._observer.identity("retriever", number=number),
        )
