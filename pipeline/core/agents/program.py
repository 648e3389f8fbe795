"""What a rollout worker runs: a program over models and a retriever. Knows no engine and no Ray.

A *program* is a picklable async function of one task. It talks to *roles* (name -> model: a policy as a program sees
it) and to the retriever, and gives back an `Episode`: one `Trajectory` per role turn, token-in and token-out. The
search agent is one (`pipeline.core.agents.search_program`); docs/recipes.md writes another.

What the infrastructure does comes to a program as one of `INFRASTRUCTURE`; it ends the turn with the stop reason of
that failure, and the worker runs the episode again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pipeline.core.actions import ActionUnavailable
from pipeline.core.config import RolloutConfig
from pipeline.core.records import Episode, Question, StopReason
from retriever_service.errors import RetrieverError, RetrieverUnavailable
from retriever_service.passages.hits import Hit


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one model turn is sampled. `top_k` 0 is off; `temperature` 0 is greedy; stop strings stay in the output.

    `max_tokens` 0 and no stop strings: the program sets its own.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, rollout: RolloutConfig, seed: int) -> Sampling:
        """As configured; `seed` is that of the run and the phase."""
        return cls(rollout.temperature, rollout.top_p, rollout.top_k, seed=seed)

    @property
    def is_from_the_model(self) -> bool:
        """True if what is sampled from is the model's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine generated.

    `logprobs[i]` is log p(token_ids[i] | before) under the distribution that was sampled from where the engine records
    that, else under the model itself (`PolicySpec.records_proposal`). `stop` is the stop string that ended it, if one
    did.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    stop: str | None
    finish_reason: Literal["stop", "eos", "length"]


class EngineError(RuntimeError):
    """The inference engine could not serve a request."""


INFRASTRUCTURE = (EngineError, RetrieverUnavailable, RetrieverError, ActionUnavailable)
"""What a program catches: the infrastructure failed, the models did nothing wrong."""


def stop_reason_of(failure: Exception) -> StopReason:
    """How a turn ends that one of `INFRASTRUCTURE` ended."""
    if isinstance(failure, RetrieverUnavailable):
        return StopReason.RETRIEVER_UNAVAILABLE
    if isinstance(failure, ActionUnavailable):
        return StopReason.ACTION_UNAVAILABLE
    bad_answer = isinstance(failure, RetrieverError)
    return StopReason.RETRIEVER_BAD_ANSWER if bad_answer else StopReason.ENGINE_ERROR


class Generator(Protocol):
    """Something that continues token ids."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion: ...


class Model(Generator, Protocol):
    """One role: a policy that a program talks to. Every call raises `EngineError` when it cannot be served."""

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, the same object at every call."""

    @property
    def max_length(self) -> int:
        """Longest context in tokens."""

    @property
    def version(self) -> int:
        """Which weights answer."""

    @property
    def records_proposal(self) -> bool:
        """True if completions carry log q of the sampled distribution instead of log p of the model."""

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) for each i >= start; the context should be one just generated."""


Retrieve = Callable[[str, int], Awaitable[Sequence[Hit]]]
"""(query, k) -> the k best passages. Raises RetrieverUnavailable when it has given up, RetrieverError when it refuses
the query or its answer makes no sense."""


class Task(Protocol):
    """What an episode is about; a `Question` is one."""

    @property
    def id(self) -> str: ...


TaskT = TypeVar("TaskT", bound=Task, contravariant=True)


class Program(Protocol[TaskT]):
    """Picklable; a frozen dataclass with `async def __call__` is the usual form."""

    async def __call__(
        self,
        task: TaskT,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        """One episode.

        Args:
            sampling: temperature, truncation and the seed of this episode; turns derive their own from it.
            sample: number of this episode among those of its task.
        """
        ...


class Further(Protocol):
    """How many more episodes of a task are to be sampled, given those that were; picklable."""

    @property
    def most(self) -> int:
        """The most that it ever asks for."""

    def __call__(self, episodes: Sequence[Episode]) -> int: ...


@dataclass(frozen=True, slots=True)
class Answering:
    """How the models of a recipe answer a question."""

    program: Program[Question]
    models: Mapping[str, str]
    """Role -> the model that the policy of this name starts from."""
    answers: str
    """The role whose turn holds the answer."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and whatever names a request: the same parts, the same seed, on any machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
