"""Rollout workers without a model: their engine only takes the time that one would take.

Sequences of an engine share its steps: each step gives every sequence in flight one token, and takes the longer the
more there are. So an engine's tokens per second rise with its batch and a sequence's fall, as in vLLM. A trajectory is
drawn from the seed that a real one would have: so many turns, so many tokens in each, and a search between two turns.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import ray

from actors.engine_use import EngineUse
from actors.rollout import Receipt, RolloutRequest
from actors.slots import Slots
from pipeline.core.agents.program import Completion, Task, derive_seed
from pipeline.core.agents.transcript import Transcript
from pipeline.core.records import Episode, Step, StopReason
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

VOCABULARY = 256
AGENTS_THAT_FIT = 10**6
"""Into an engine's cache: it has none."""
HITS = tuple(
    Hit(Passage(f"p{n}", f"Title {n}", "A passage of some length about this and that. " * 8), 1.0)
    for n in range(3)
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds; and how long trajectories are.

    Attributes:
        step_s, step_per_sequence_s: a step of the engine takes `step_s + step_per_sequence_s * sequences`.
        search_s: a search.
        turns: the most turns of a trajectory; the least is 1, all are equally likely.
        turn_tokens: mean length of a turn in tokens. Lengths are log-normal: the longest are many times as long.
        of_question: share of what decides the lengths that is the question's own, the same in every iteration. By
            default the mean lengths of a question's trajectories in two iterations correlate at about 0.5, as in the
            demo (0.46 and 0.57).
        passage_tokens: what a search adds to the context.
    """

    step_s: float = 0.02
    step_per_sequence_s: float = 0.00019
    search_s: float = 0.3
    turns: int = 7
    turn_tokens: int = 150
    of_question: float = 0.15
    passage_tokens: int = 300

    def of_step(self, sequences: int) -> float:
        return self.step_s + self.step_per_sequence_s * sequences


class Engine:
    """Takes time. One event loop only."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._steps, self._at = 0.0, 0.0
        """Steps that are done, as of that time of the loop."""
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, tokens: int) -> None:
        """A sequence of so many tokens."""
        self._go_on()
        end = asyncio.get_running_loop().create_future()
        heapq.heappush(self._ends, (self._steps + tokens, next(self._numbers), end))
        self._plan()
        await end

    def _go_on(self) -> None:
        now = asyncio.get_running_loop().time()
        self._steps += (now - self._at) / self.pace.of_step(len(self._ends))
        self._at = now

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ends:
            left = (self._ends[0][0] - self._steps) * self.pace.of_step(len(self._ends))
            self._timer = asyncio.get_running_loop().call_later(max(0.0, left), self._tick)

    def _tick(self) -> None:
        self._go_on()
        while self._ends and self._ends[0][0] <= self._steps + 1e-6:
            heapq.heappop(self._ends)[2].set_result(None)
        self._plan()


class Worker:
    """One engine and so many trajectories at once."""

    def __init__(self, pace: Pace, concurrency: int) -> None:
        self._pace, self._engine = pace, Engine(pace)
        self.slots = Slots(concurrency)

    async def sample(self, task: Task, seed: int, samples: range) -> list[list[int]]:
        """Takes the time of these trajectories. The tokens of each one's turns."""
        drawn = [self.turns(task, seed, sample) for sample in samples]
        await asyncio.gather(*map(self._live, drawn))
        return drawn

    def turns(self, task: Task, seed: int, sample: int) -> list[int]:
        """How many tokens each turn has."""
        question = np.random.default_rng(derive_seed(task.id)).standard_normal(2)
        drawn = np.random.default_rng(derive_seed(seed, task.id, sample)).standard_normal(
            1 + self._pace.turns
        )
        own = self._pace.of_question
        several = NormalDist().cdf(own**0.5 * question[0] + (1 - own) ** 0.5 * drawn[0])
        number, sigma = 1 + int(several * self._pace.turns), 0.8
        normal = own**0.5 * question[1] + (1 - own) ** 0.5 * drawn[1 : 1 + number]
        lengths = self._pace.turn_tokens * np.exp(sigma * normal - sigma**2 / 2)
        return [max(1, int(length)) for length in lengths]

    async def turn(self, tokens: int) -> None:
        """One turn by itself, for a loop that goes in lock-step."""
        await self._engine.generate(tokens)

    async def _live(self, turns: list[int]) -> None:
        async with self.slots.one():
            for number, tokens in enumerate(turns):
                if number:
                    await asyncio.sleep(self._pace.search_s)
                await self._engine.generate(tokens)


@ray.remote
class Host:
    """A process with several workers. What `actors.rollout.RolloutWorker` has, with the worker's number in front."""

    def __init__(self, pace: Pace, concurrency: int, workers: int) -> None:
        self._pace = pace
        self._workers = [Worker(pace, concurrency) for _ in range(workers)]
        self._version = 0

    async def where(self, number: int) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def start(self, number: int, model: str, version: int) -> int:
        self._version = version
        return AGENTS_THAT_FIT

    async def use(self, number: int) -> EngineUse:
        return EngineUse()

    async def ping(self, number: int) -> None:
        pass

    async def wants_more(self, number: int) -> None:
        await self._workers[number].slots.nobody_waits()

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    async def rollout(self, number: int, request: RolloutRequest) -> tuple[Receipt, list[Episode]]:
        samples = range(request.samples)
        turns = await self._workers[number].sample(request.task, request.sampling.seed, samples)
        episodes = [self._episode(request.task, sample, tokens) for sample, tokens in enumerate(turns)]
        return Receipt.of(episodes), episodes

    def _episode(self, task: Task, sample: int, turns: list[int]) -> Episode:
        """Of the size of a real one: ids, log-probabilities, what each search found, and a likelihood."""
        transcript = Transcript()
        transcript.append_environment(list(range(100)))
        for number, tokens in enumerate(turns):
            if number:
                transcript.append_environment([1] * self._pace.passage_tokens)
                transcript.steps.append(Step("a sub-query of the question", HITS, "what was found"))
            ids = [token % VOCABULARY for token in range(tokens)]
            transcript.append_model(Completion(ids, [-0.5] * tokens, "", None, "stop"))
        trajectory = transcript.trajectory(
            question_id=task.id,
            sample=sample,
            role="searcher",
            policy_version=self._version,
            stop_reason=StopReason.ANSWERED,
            answer="Ada",
            answer_start=len(transcript.token_ids) - 1,
        )
        object.__setattr__(trajectory, "log_likelihoods", (-1.0 - sample,))
        return Episode(task.id, sample, (trajectory,))


class Handle:
    """One worker of a host, as the pool calls it."""

    def __init__(self, host: Any, number: int) -> None:
        for name in ("where", "start", "ping", "wants_more", "rollout"):
            setattr(self, name, _Method(getattr(host, name), number))


class _Method:
    def __init__(self, method: Any, number: int) -> None:
        self._method, self._number = method, number

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._number, *arguments)


def in_no_time(work: Callable[[], Any]) -> float:
    """Run a coroutine function on a loop whose clock jumps to the next timer; the seconds that it thinks it took."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        runner.run(work())
        return runner.get_loop().time()


class _Jumping(selectors.DefaultSelector):
    """Nobody waits."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        return super().select(0)


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now
