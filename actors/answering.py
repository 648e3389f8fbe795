"""A search agent that answers in this process: one engine, one retriever, no Ray.

What samples, evaluates and is asked on a cluster runs here as it is: the same program, engine and renderer. A server
holds these itself, because it must be able to end an answer at once, between two tokens, and to tell of each of its
steps as it happens.

Guarantees:
- an answer that is cancelled ends its generation and its search;
- after the engine died or hung, whatever asks for it fails with `EngineError`, until `restart` has brought another;
- every wait is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from actors.engine import LOOK_EVERY_S, VllmEngine
from actors.engine_options import EngineOptions, in_flight
from actors.homes import threads_of_replica
from actors.placement import GPU_MEMORY_UTILIZATION, PolicyPlacement
from actors.pool import engine_options
from actors.retriever import MAX_QUERY_CHARS, RetrieverClient, client_of, copied, http_replicas
from actors.rollout import LocalModel
from actors.session import actor_environment
from pipeline.core.agents.program import EngineError, Sampling
from pipeline.core.agents.search import SEARCHER, OnEvent
from pipeline.core.agents.search_program import SearchProgram, renderer_of
from pipeline.core.config import Config, RetrieverConfig
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Question, Trajectory
from pipeline.core.retrieval import Searched
from retriever_service.index.local_copy import LocalCopy
from retriever_service.index.read_ahead import read_ahead
from retriever_service.machine import available_cores
from retriever_service.passages.hits import Hit
from retriever_service.search.engine import SearchEngine
from retriever_service.service.batching import BatchingSearcher

logger = logging.getLogger(__name__)

PING_EVERY_S = 1.0
"""Between two looks at whether the engine still answers, in seconds."""

MOST_TOKEN_CHARACTERS = 32
"""More than tokens of a text have on average."""


class IndexReplica:
    """An index, opened in this process by a thread of its own; see `actors.retriever.Replica`.

    Args:
        gpus: that the engine computes on; 0 if it shares the cores with the retriever.
    """

    def __init__(self, index: Path, config: RetrieverConfig, gpus: int) -> None:
        self._options = config.options
        sharers = 1 if gpus else 2
        threads = config.threads_per_replica or threads_of_replica(available_cores(), sharers, gpus)

        self._copy: LocalCopy | None = None
        """Held as long as the index is used, so that nobody removes it."""

        def load() -> SearchEngine:
            here = index
            if config.local_copy is not None:
                self._copy = copied(index, config.local_copy)
                here = self._copy.directory
            engine = SearchEngine.open(
                here,
                device=config.torch_device,
                num_threads=threads,
                search_parameters=config.search_parameters,
            )
            read_ahead(here)
            engine.first_search()
            return engine

        self._searcher = BatchingSearcher(load, max_batch=config.max_batch)

    async def ready(self) -> None:
        """
        Raises:
            RetrieverError: the index cannot be opened.
        """
        await self._searcher.ready()

    async def search(self, query: str, k: int) -> list[Hit]:
        (hits,) = await self._searcher.search([query[:MAX_QUERY_CHARS]], k, self._options)
        return hits

    def close(self) -> None:
        """Let the thread end."""
        self._searcher.close()


class AnsweringAgent:
    """Answers questions with one model. Its coroutines belong to one event loop; await `start` first.

    Args:
        config: its sections `agent`, `model`, `rollout`, `retriever` and `cluster` say how.
        snapshot: the version that it starts with.
        searched: a built index, or servers.
    """

    def __init__(self, config: Config, snapshot: Snapshot, searched: Searched) -> None:
        self.snapshot = snapshot
        self._config = config
        self._searched = searched
        self._replica: IndexReplica | None = None
        self._engine = VllmEngine(engine_options_of(config, snapshot.model))

    @property
    def version(self) -> int:
        """Of the weights that answer."""
        return self.snapshot.version

    async def start(self) -> int:
        """Open the retriever and the engine.

        Returns:
            how many answers fit into the engine at once.

        Raises:
            RetrieverError: the index cannot be opened.
            EngineError: vLLM could not start, or took too long.
        """
        on_gpu = has_gpu_packages()
        os.environ.update(actor_environment(on_gpu=on_gpu))
        # A fork of a process with threads may wait for ever for a lock that one of them held.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        config = self._config.retriever
        if isinstance(self._searched, Path):
            gpus = self._config.rollout.tensor_parallel_size if on_gpu else 0
            self._replica = IndexReplica(self._searched, config, gpus)
            self._retriever: RetrieverClient = client_of([self._replica], config)
            await self._replica.ready()
        else:
            self._retriever = client_of(http_replicas(self._searched.clients, config), config)
        await self._engine.start(self.snapshot.version)
        options = self._engine.options
        return in_flight(self._config.rollout.concurrency, self._engine.agents_that_fit, options.max_num_seqs)

    def check(self, question: str) -> None:
        """
        Raises:
            UserError: it is so long that no turn fits behind it.
        """
        options, agent = self._engine.options, self._config.agent
        room = options.max_model_len - min(2 * agent.max_turn_tokens, options.max_model_len // 2)
        # What is much too long is not even looked at.
        tokens = len(question) // MOST_TOKEN_CHARACTERS
        if tokens <= room:
            tokens = len(renderer_of(LocalModel(self._engine).tokenizer, agent).prompt_ids(question))
        if tokens > room:
            raise UserError(
                f"the question, with the conversation before it, has {tokens} tokens or more; at most {room} leave "
                "room for an answer"
            )

    async def answer(self, question: str, sampling: Sampling, on_event: OnEvent) -> Trajectory:
        """One trajectory. What infrastructure did is its stop reason; `on_event` is told of each step as it happens."""
        program = SearchProgram(self._config.agent, on_event=on_event)
        roles: Mapping[str, LocalModel] = {SEARCHER: LocalModel(self._engine)}
        task = Question("asked", question, ("",))
        episode = await program(task, roles, self._retriever.search, sampling=sampling, sample=0)
        return episode.turn(SEARCHER)

    async def search(self, query: str, k: int) -> Sequence[Hit]:
        """The k best passages.

        Raises:
            RetrieverError, RetrieverUnavailable: as `RetrieverClient.search`.
        """
        return await self._retriever.search(query, k)

    async def load(self, snapshot: Snapshot) -> None:
        """Answer with another version of the model from now on; nothing may be in flight.

        Raises:
            WeightTransferError: it could not be loaded. Nothing is answered until `restart`.
        """
        await self._engine.reload(snapshot.model, snapshot.version, self._config.cluster.push_timeout_s)
        self.snapshot = snapshot

    async def until_lost(self) -> str:
        """Waits until the engine has died, or has not answered for `cluster.heartbeat_timeout_s`; says which."""
        loop, limit_s = asyncio.get_running_loop(), self._config.cluster.heartbeat_timeout_s
        while True:
            asked = loop.time()
            ping = asyncio.create_task(self._engine.ping())
            try:
                while not ping.done():
                    await asyncio.wait([ping], timeout=LOOK_EVERY_S)
                    if self._engine.is_dead:
                        return "its process died"
                    if loop.time() - asked > limit_s:
                        return f"it did not answer for {limit_s:g} s (cluster.heartbeat_timeout_s)"
                if isinstance(failure := ping.exception(), EngineError):
                    return str(failure)
            finally:
                ping.cancel()
            await asyncio.sleep(PING_EVERY_S)

    async def restart(self) -> None:
        """Another engine in place of this one, with the same version.

        Raises:
            EngineError: it could not start.
        """
        await asyncio.to_thread(self._engine.shutdown)
        self._engine = VllmEngine(replace(self._engine.options, model=self.snapshot.model))
        await self._engine.start(self.snapshot.version)

    async def close(self) -> None:
        """End the engine and the retriever."""
        await asyncio.to_thread(self._engine.shutdown)
        if self._replica is not None:
            self._replica.close()


def engine_options_of(config: Config, model: str) -> EngineOptions:
    """As an engine of a run has them that shares its machine with nothing but a retriever."""
    on_cpu = not has_gpu_packages()
    memory = config.rollout.gpu_memory_utilization or GPU_MEMORY_UTILIZATION
    size = float(config.rollout.tensor_parallel_size)
    placement = PolicyPlacement("shared_memory", [0], [], 0.0 if on_cpu else size, 0.0, memory)
    spec = PolicySpec(SEARCHER, config.model.at(model), config.rollout)
    return engine_options(spec, placement, config.cluster, on_cpu=on_cpu, engines_per_node=1, sleeps=False)
