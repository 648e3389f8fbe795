"""A rollout worker: one vLLM engine, many search agents at once.

A request is one question with its K samples. All agents run as coroutines; none waits for another, and the engine
batches whatever is in flight. What comes back for a question is two objects: a small `RolloutSummary` for the driver
and the trajectories themselves, which the driver passes on by reference only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from actors.engine import EngineOptions, VllmEngine, WeightState
from actors.retriever import RetrieverClient
from pipeline.core.agents.search import EngineError, Sampling, SearchAgent, derive_seed
from pipeline.core.config import AgentConfig
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Question, ScoreRequest, Trajectory
from pipeline.core.renderer import Renderer

T = TypeVar("T")
Scoring = Callable[[Sequence[int], int], Awaitable[T]]

INFRASTRUCTURE_ATTEMPTS = 2
"""A trajectory that an infrastructure failure ended is run this many times before it is given up, and so is a scoring
request."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Sample `samples` trajectories of `question`. `seed`: of run and iteration. `temperature`: 0 is greedy."""

    question: Question
    agent: AgentConfig
    samples: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """What the driver needs to know of a finished request: counts, not contents."""

    question_id: str
    trajectories: int
    infrastructure_failures: int
    generated_tokens: int
    last_failure: str = ""


class RolloutWorker:
    """The actor class; `cluster.py` gives it its resources. Await `start` before use.

    The weight-transfer verbs are those of `VllmEngine`, called by the learner (`actors.weight_transfer.RayEngines`).

    Args:
        options: of the vLLM engine.
        retriever: client of the retriever replicas.
        concurrency: agents in flight.
    """

    def __init__(self, options: EngineOptions, retriever: RetrieverClient, *, concurrency: int) -> None:
        self.options = options
        self.retriever = retriever
        self.engine = VllmEngine(options)
        self.tokenizer = load_tokenizer(options.model)
        self._slots = asyncio.Semaphore(concurrency)
        self._agents: dict[str, SearchAgent] = {}

    async def start(self, version: int) -> str:
        """Bring the engine up with the weights in `options.model`, which are policy version `version`.

        Returns:
            the id of this worker's node.
        """
        await self.engine.start(version)
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(num_returns=2)
    async def rollout(self, request: RolloutRequest) -> tuple[RolloutSummary, list[Trajectory]]:
        """All samples of one question, in the order of their numbers."""
        agent = self._agent(request.agent)
        runs = [self._sample(agent, request, sample) for sample in range(request.samples)]
        trajectories = await asyncio.gather(*runs)
        failures = [t for t in trajectories if t.stop_reason.is_infrastructure]
        summary = RolloutSummary(
            question_id=request.question.id,
            trajectories=len(trajectories),
            infrastructure_failures=len(failures),
            generated_tokens=sum(int(t.loss_mask.sum()) for t in trajectories),
            last_failure=failures[-1].detail if failures else "",
        )
        return summary, list(trajectories)

    def _exit_if_dead(self) -> None:
        """An engine process that died cannot come back: this actor ends, and the driver replaces it as a whole."""
        if self.engine.is_dead:
            os._exit(1)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """log p of the tokens from `start` on, of each request."""
        return await self._answers(self.engine.score, requests)

    async def token_logprobs(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """The same, token by token."""
        return await self._answers(self.engine.token_logprobs, requests)

    async def _answers(self, ask: Scoring[T], requests: Sequence[ScoreRequest]) -> list[T]:
        return list(await asyncio.gather(*(self._answer(ask, request) for request in requests)))

    async def _answer(self, ask: Scoring[T], request: ScoreRequest) -> T:
        for attempts_left in reversed(range(INFRASTRUCTURE_ATTEMPTS)):
            try:
                return await ask(request.token_ids.tolist(), request.start)
            except EngineError:
                self._exit_if_dead()
                if not attempts_left:
                    raise
        raise AssertionError  # the last attempt returns or raises

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        await self.engine.init_weight_transfer_engine(init_info)

    async def start_weight_update(self, version: int, timeout_s: float) -> None:
        await self.engine.start_weight_update(version, timeout_s)

    async def update_weights(self, update_info: dict[str, Any], payload: Any = None) -> None:
        await self.engine.update_weights(update_info, payload)

    async def finish_weight_update(self, version: int, digest: str) -> WeightState:
        return await self.engine.finish_weight_update(version, digest)

    async def reload(self, model: str, version: int, timeout_s: float) -> None:
        await self.engine.reload(model, version, timeout_s)

    async def sleep(self, timeout_s: float) -> None:
        await self.engine.sleep(timeout_s)

    async def shutdown(self) -> None:
        """End the engine process."""
        self.engine.shutdown()

    async def _sample(self, agent: SearchAgent, request: RolloutRequest, sample: int) -> Trajectory:
        sampling = Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=request.agent.max_turn_tokens,
            seed=derive_seed(request.seed, request.question.id, sample),
            stop=(),
        )
        async with self._slots:
            for _ in range(INFRASTRUCTURE_ATTEMPTS):
                trajectory = await agent.run(
                    request.question,
                    sampling=sampling,
                    sample=sample,
                    policy_version=self.engine.weights.version,
                )
                if not trajectory.stop_reason.is_infrastructure:
                    break
                self._exit_if_dead()
        return trajectory

    def _agent(self, config: AgentConfig) -> SearchAgent:
        key = config.model_dump_json()
        if key not in self._agents:
            self._agents[key] = SearchAgent(
                Renderer(self.tokenizer, config),
                self.engine,
                self.retriever.search,
                max_length=self.options.max_model_len,
            )
        return self._agents[key]


RolloutActor = ray.remote(RolloutWorker)
