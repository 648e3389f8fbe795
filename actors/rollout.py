"""A rollout worker: one vLLM engine, many episodes at once.

A request is one task with its K samples of a program. All episodes run as coroutines; none waits for another, and the
engine batches whatever is in flight. What comes back for a task is two objects: a small `Receipt` for the driver and
the episodes themselves, which the driver passes on by reference only.

A program whose roles are several policies runs on a worker of one of them and reaches the others through their
workers' `generate` and `token_logprobs`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from actors import metrics
from actors.actor_log import Identity, introduce
from actors.deaths import DEATHS
from actors.engine import VllmEngine, WeightState
from actors.engine_options import EngineOptions, in_flight
from actors.engine_use import EngineUse
from actors.retriever import RetrieverClient
from actors.slots import Slots
from pipeline.core.agents.program import (
    Completion,
    EngineError,
    Further,
    Model,
    Program,
    Sampling,
    Task,
    derive_seed,
)
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Episode, ScoreRequest
from pipeline.core.shards import Counts
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.hits import Hit

logger = logging.getLogger(__name__)

T = TypeVar("T")

INFRASTRUCTURE_ATTEMPTS = 2
"""An episode that an infrastructure failure ended is run this many times before it is given up, and so is a scoring
request."""


class PeerDied(RuntimeError):
    """The worker that a role of the program lives on has died. `role` says whose."""

    def __init__(self, role: str) -> None:
        super().__init__(f"the worker of the role {role} died")
        self.role = role

    def __reduce__(self) -> tuple[type[PeerDied], tuple[str]]:
        return PeerDied, (self.role,)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another policy's worker, as a role of a program sees it: its handle, its engine's options and weight version."""

    handle: Any
    options: EngineOptions
    version: int


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Run `program` `samples` times on `task`, and then as many times more as `further` says.

    Attributes:
        sampling: temperature and truncation; its seed is that of the run and the phase, from which each episode derives
            its own.
        roles: the roles that this worker's own engine plays.
        peers: the other roles.
        phase: what is being sampled for, for metrics.
    """

    task: Task
    program: Program[Any]
    samples: int
    sampling: Sampling
    roles: tuple[str, ...]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    phase: str = ""
    further: Further | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver is told of a task's episodes: what was counted in them, and how many bytes they take."""

    counts: Counts
    size: int

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Receipt:
        buffers: list[pickle.PickleBuffer] = []
        rest = pickle.dumps(episodes, protocol=5, buffer_callback=buffers.append)
        return cls(Counts.of(episodes), len(rest) + sum(buffer.raw().nbytes for buffer in buffers))


class RolloutWorker:
    """The actor class; `actors.pool` gives it its resources. Await `start` before use.

    The weight-transfer verbs are those of `VllmEngine`, called by the learner (`actors.weight_transfer.RayEngines`).

    Args:
        options: of the vLLM engine; `start` names the model.
        retriever: client of the retriever replicas.
        concurrency: episodes in flight. None: as many as fit into the engine's cache.
        identity: under which it logs and counts.
    """

    _in_flight = 0

    def __init__(
        self,
        options: EngineOptions,
        retriever: RetrieverClient,
        *,
        concurrency: int | None,
        identity: Identity | None = None,
    ) -> None:
        introduce(identity)
        self.retriever = retriever
        self.engine = VllmEngine(options)
        self._concurrency = concurrency

    async def where(self) -> str:
        """The id of this worker's node. Answers before there is an engine: as soon as Ray has found room."""
        return str(ray.get_runtime_context().get_node_id())

    async def start(self, model: str, version: int) -> int:
        """Bring the engine up with policy version `version`, which directory `model` holds.

        Returns:
            how many agents fit into its cache (`agents_that_fit`).
        """
        began = time.perf_counter()
        # Not that of the constructor: a worker may have waited long for its place.
        self.engine.options = replace(self.engine.options, model=model)
        await self.engine.start(version)
        fit = self.engine.agents_that_fit
        self._slots = Slots(in_flight(self._concurrency, fit, self.engine.options.max_num_seqs))
        logger.info(
            f"the engine is up after {time.perf_counter() - began:.1f} s, with {model}; {fit} agents fit into its cache"
        )
        self._say_version()
        return fit

    async def use(self) -> EngineUse:
        """What the engine did since its start."""
        return self.engine.use

    async def ping(self) -> None:
        """Answers if this process and its engine's do."""
        await self._or_exit(self.engine.ping)

    async def search_with(self, retriever: RetrieverClient) -> None:
        """From now on programs retrieve there."""
        self.retriever = retriever

    async def wants_more(self) -> None:
        """Answers as soon as none of the episodes that it was asked for waits for a slot."""
        await self._slots.nobody_waits()

    @ray.method(num_returns=2)
    async def rollout(self, request: RolloutRequest) -> tuple[Receipt, list[Episode]]:
        """All episodes of one task, in the order of their numbers.

        Raises:
            PeerDied: another policy's worker is gone; nothing of the request is kept.
        """
        episodes = await self._episodes(request, range(request.samples))
        if request.further is not None and (more := request.further(episodes)):
            episodes += await self._episodes(request, range(request.samples, request.samples + more))
        return Receipt.of(episodes), episodes

    async def _episodes(self, request: RolloutRequest, samples: range) -> list[Episode]:
        return list(await asyncio.gather(*(self._episode(request, sample) for sample in samples)))

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """One turn for a program that runs elsewhere."""
        return await self._or_exit(lambda: self.engine.generate(prompt_ids, sampling))

    async def token_logprobs(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """log p of each token from `start` on, of each request."""
        return list(await asyncio.gather(*(self._score(request) for request in requests)))

    async def _score(self, request: ScoreRequest) -> list[float]:
        for attempts_left in reversed(range(INFRASTRUCTURE_ATTEMPTS)):
            try:
                return await self._or_exit(
                    lambda: self.engine.token_logprobs(request.token_ids.tolist(), request.start)
                )
            except EngineError:
                if not attempts_left:
                    raise
        raise AssertionError  # the last attempt returns or raises

    async def _or_exit(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except EngineError:
            self._exit_if_dead()
            raise

    def _exit_if_dead(self) -> None:
        """An engine process that died cannot come back: this actor ends, and the driver replaces it as a whole."""
        if self.engine.is_dead:
            os._exit(1)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        await self.engine.init_weight_transfer_engine(init_info)

    async def start_weight_update(self, version: int, timeout_s: float) -> None:
        await self.engine.start_weight_update(version, timeout_s)

    async def update_weights(self, update_info: dict[str, Any], payload: Any = None) -> None:
        await self.engine.update_weights(update_info, payload)

    async def finish_weight_update(self, version: int, digest: str) -> WeightState:
        state = await self.engine.finish_weight_update(version, digest)
        self._say_version()
        return state

    async def reload(self, model: str, version: int, timeout_s: float) -> None:
        await self.engine.reload(model, version, timeout_s)
        self._say_version()

    async def sleep(self, timeout_s: float) -> None:
        await self.engine.sleep(timeout_s)
        self._say_version()

    def _say_version(self) -> None:
        weights = self.engine.weights
        logger.info(weights.refusal or f"serves version {weights.version}")
        metrics.VERSION.set(-1 if weights.refusal else weights.version)

    async def shutdown(self) -> None:
        """End the engine process."""
        self.engine.shutdown()

    async def _episode(self, request: RolloutRequest, sample: int) -> Episode:
        async with self._slots.one():
            with self._counted():
                episode = await self._attempts(request, sample)
        _count(episode, request.phase)
        return episode

    async def _attempts(self, request: RolloutRequest, sample: int) -> Episode:
        sampling = replace(request.sampling, seed=derive_seed(request.sampling.seed, request.task.id, sample))
        for _ in range(INFRASTRUCTURE_ATTEMPTS):
            peers = {name: RemoteModel(name, peer) for name, peer in request.peers.items()}
            own = LocalModel(self.engine)
            roles: dict[str, Model] = {**dict.fromkeys(request.roles, own), **peers}
            episode = await request.program(
                request.task, roles, partial(self._search, request.phase), sampling=sampling, sample=sample
            )
            if episode.failure is None:
                break
            self._exit_if_dead()
            for name, peer in peers.items():
                if peer.is_dead:
                    raise PeerDied(name)
        return episode

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """An episode in flight."""
        self._in_flight += 1
        metrics.IN_FLIGHT.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            metrics.IN_FLIGHT.set(self._in_flight)

    async def _search(self, phase: str, query: str, k: int) -> Sequence[Hit]:
        """What programs retrieve with."""
        began, outcome = time.perf_counter(), "cancelled"
        try:
            hits = await self.retriever.search(query, k)
            outcome = "found"
            return hits
        except (RetrieverError, RetrieverUnavailable) as error:
            outcome = "unavailable" if isinstance(error, RetrieverUnavailable) else "bad_answer"
            logger.warning(f"a search failed: {error}")
            raise
        finally:
            metrics.SEARCHES.add(phase=phase, outcome=outcome)
            metrics.SEARCH_SECONDS.observe(time.perf_counter() - began)


def _count(episode: Episode, phase: str) -> None:
    last = episode.failure or episode.turns[-1]
    metrics.EPISODES.add(phase=phase, reason=last.stop_reason.value)
    metrics.GENERATED_TOKENS.add(Counts.of([episode]).generated_tokens, phase=phase)


class LocalModel:
    """A role that this worker's own engine plays."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.tokenizer = _tokenizer(engine.options.model)
        self.max_length = engine.options.max_model_len
        self.records_proposal = engine.options.record_proposal
        self.version = engine.weights.version
        self.generate = engine.generate
        self.token_logprobs = engine.token_logprobs


class RemoteModel:
    """A role that another worker's engine plays."""

    def __init__(self, role: str, peer: Peer) -> None:
        self._role = role
        self._handle = peer.handle
        self.tokenizer = _tokenizer(peer.options.model)
        self.max_length = peer.options.max_model_len
        self.records_proposal = peer.options.record_proposal
        self.version = peer.version
        self.is_dead = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        return await self._answer(self._handle.generate.remote(list(prompt_ids), sampling))

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        (logprobs,) = await self._answer(
            self._handle.token_logprobs.remote([ScoreRequest.of(token_ids, start)])
        )
        return list(logprobs)

    async def _answer(self, reference: Any) -> Any:
        try:
            return await reference
        except DEATHS as error:
            self.is_dead = True
            raise EngineError(f"the worker of the role {self._role} died: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise EngineError(f"role {self._role}: {error.cause}") from error
            raise


@lru_cache(maxsize=8)
def _tokenizer(model: str) -> Any:
    return load_tokenizer(model)


RolloutActor = ray.remote(RolloutWorker)
