"""The retriever of a run: replicas of one index as actors, or the servers of `retriever.url`; and its re-indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.retriever import ActorReplica, HttpReplica, RetrieverActor, RetrieverClient, client_of
from actors.session import wait_for
from pipeline.core.config import RetrieverConfig
from pipeline.core.errors import UserError
from pipeline.core.retrieval import Searched, build_run_index
from retriever_service.encoding.encoder import EncoderSpec

MAX_RESTARTS = 3
"""Times that Ray starts a dead replica again; clients fail over or wait meanwhile."""


class Retrievers:
    """Starts them; await `wait` before use.

    Args:
        config: the `retriever` section.
        searched: a built index, for actors of the run's own; or servers, and there are no such actors.
        runtime_env: Ray environment of the actors.
        start_timeout_s: longest wait for an index to be opened, in seconds.
    """

    def __init__(
        self,
        config: RetrieverConfig,
        searched: Searched,
        *,
        runtime_env: dict[str, Any],
        start_timeout_s: float,
    ) -> None:
        self.config = config
        self._runtime_env, self._start_timeout_s = runtime_env, start_timeout_s
        self._actors: list[Any] = []
        if isinstance(searched, Path):
            self._start(searched)
        else:
            self.client = client_of([HttpReplica(client) for client in searched.clients], config)

    client: RetrieverClient
    """What programs retrieve with; another one after `reindex`."""

    def wait(self) -> None:
        """Until every replica answers."""
        what = "retrievers to open their index (cluster.start_timeout_s)"
        wait_for([actor.ready.remote() for actor in self._actors], self._start_timeout_s, what)

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

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _start(self, index: Path) -> None:
        self._actors = [self._new_actor(index) for _ in range(self.config.replicas)]
        self.client = client_of([ActorReplica(actor) for actor in self._actors], self.config)

    def _new_actor(self, index: Path) -> Any:
        config = self.config
        return RetrieverActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            num_gpus=config.gpus_per_replica,
            runtime_env=self._runtime_env,
            scheduling_strategy="SPREAD",
            max_restarts=MAX_RESTARTS,
        ).remote(
            str(index),
            device=config.torch_device,
            max_batch=config.max_batch,
            search_parameters=config.search_parameters,
        )
