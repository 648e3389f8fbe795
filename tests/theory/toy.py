"""A search agent so small that everything about it can be added up, for the tests of the method's theory.

Of each question the agent writes a trajectory, then an answer. Either is one of five words of one or two tokens: token
0 ends a word at once, token 1 or 2 has one more behind it. So p(z|x), p(y|x,z), p(y|x) and all their gradients are
finite sums, which this module takes from tables of logits. Weights and losses it leaves to the project.

Letters: X questions, Z trajectories, Y answers; theta is one vector, float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, settings
from torch import Tensor

from pipeline.core.config import WeightingConfig
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Outputs, Rows
from pipeline.core.records import Example, StopReason, Trajectory
from pipeline.core.weighing import log_ratio
from pipeline.core.weighting import Gold, Scored, log_weights

WORDS = ((0,), (1, 0), (1, 1), (2, 0), (2, 1))
QUESTIONS = 2
GOLD = (3, 0)
"""Each question's gold answer: one of two tokens, one of one."""
ALL = tuple(range(len(WORDS)))
EVENLY = (0, 0, 1, 2, 3, 4)
"""Words as often as `untrained` writes them, that of one token twice: averages over these are exact expectations."""
NO_CLIP = 1e6

exact = settings(deadline=None, max_examples=25, derandomize=True, phases=[Phase.generate])
"""Of properties that hold for every theta. A smaller seed is no simpler toy: nothing is shrunk."""

_SHAPES = (
    (QUESTIONS, 3),
    (QUESTIONS, 3, 2),
    (QUESTIONS, len(WORDS), 3),
    (QUESTIONS, len(WORDS), 3, 2),
)
SIZE = sum(math.prod(shape) for shape in _SHAPES)
OF_TRAJECTORIES = sum(math.prod(shape) for shape in _SHAPES[:2])
"""The first so many numbers of theta say what trajectories are written, the others what answers."""


def random_theta(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@cache
def untrained() -> Agent:
    """Each next token is as likely as the others."""
    return Agent(torch.zeros(SIZE, dtype=torch.float64))


class Agent:
    """The model with the parameters `theta` [SIZE]: logits of each next token. At a temperature they are divided by it.

    `log_p` [SIZE + 1] holds each token's log-probability where `theta` has its logit, and 0 behind them.
    """

    def __init__(self, theta: Tensor, temperature: float = 1.0) -> None:
        parts = torch.split(theta / temperature, [math.prod(shape) for shape in _SHAPES])
        tables = [part.reshape(shape).log_softmax(-1) for part, shape in zip(parts, _SHAPES, strict=True)]
        self.log_p = torch.cat([*(table.flatten() for table in tables), theta.new_zeros(1)])

    def log_trajectories(self, x: int) -> Tensor:
        """log p(z|x), [Z]."""
        return self.log_p[_TRAJECTORIES[x]].sum(-1)

    def log_likelihoods(self, x: int, y: int) -> Tensor:
        """log p(y|x,z), [Z]."""
        return self.log_p[_ANSWERS[x, :, y]].sum(-1)

    def log_marginal(self, x: int, y: int | None = None) -> Tensor:
        """log p(y|x); of the gold answer where none is given."""
        y = GOLD[x] if y is None else y
        return torch.logsumexp(self.log_trajectories(x) + self.log_likelihoods(x, y), dim=0)

    def posterior(self, x: int) -> Tensor:
        """p(z|x,y) of the gold answer, [Z]."""
        return torch.exp(self.log_trajectories(x) + self.log_likelihoods(x, GOLD[x]) - self.log_marginal(x))

    @cached_property
    def numbers(self) -> list[float]:
        return self.log_p.tolist()


def _places() -> tuple[Tensor, Tensor]:
    """Where `log_p` has the tokens of each trajectory [X, Z, 2] and answer [X, Z, Y, 2]; of one token, then the 0."""
    first, second, answer_first, answer_second = (
        part.reshape(shape)
        for part, shape in zip(
            torch.split(torch.arange(SIZE), [math.prod(shape) for shape in _SHAPES]), _SHAPES, strict=True
        )
    )

    def of_words(first: Tensor, second: Tensor) -> Tensor:
        words = [
            (first[token], second[token, more[0]] if more else torch.tensor(SIZE)) for token, *more in WORDS
        ]
        return torch.stack([torch.stack(word) for word in words])

    questions = range(QUESTIONS)
    return (
        torch.stack([of_words(first[x], second[x]) for x in questions]),
        torch.stack(
            [torch.stack([of_words(answer_first[x, z], answer_second[x, z]) for z in ALL]) for x in questions]
        ),
    )


_TRAJECTORIES, _ANSWERS = _places()


@cache
def places(x: int, z: int, y: int) -> tuple[list[int], list[int]]:
    """Where `log_p` has the tokens of z, and those of y behind it."""
    both = _TRAJECTORIES[x, z].tolist(), _ANSWERS[x, z, y].tolist()
    z_part, y_part = ([place for place in part if place < SIZE] for part in both)
    return z_part, y_part


# ---------------------------------------------------------------- what the project makes of it


def sampled(agent: Agent, x: int, z: int, own: int, *, by: Agent | None = None) -> Trajectory:
    """The record of z with the answer `own`: prompt, z, passage, answer; sampled from `by`, or from the agent."""

    def numbers(of: Agent) -> np.ndarray:
        z_part, y_part = ([of.numbers[place] for place in part] for part in places(x, z, own))
        return np.array([math.nan, *z_part, math.nan, *y_part], dtype=np.float32)

    logprobs = numbers(agent)
    return Trajectory(
        question_id=f"q{x}",
        sample=0,
        policy_version=0,
        token_ids=np.array([9, *WORDS[z], 9, *WORDS[own]], dtype=np.int32),
        loss_mask=~np.isnan(logprobs),
        logprobs=logprobs,
        answer_start=len(WORDS[z]) + 2,
        steps=(),
        answer="",
        stop_reason=StopReason.ANSWERED,
        proposal_logprobs=None if by is None else numbers(by),
    )


def score(
    agent: Agent,
    x: int,
    written: Sequence[int | tuple[int, int]],
    config: WeightingConfig,
    *,
    by: Agent | None = None,
    golds: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None,
) -> list[Scored]:
    """A question's samples as the project's E-step knows them, from the log-probabilities of their tokens.

    Args:
        written: what was sampled: trajectories, each with an answer of its own where `rewards` are asked for.
        by: the proposal that they were sampled from; None: the agent itself.
        golds: the accepted answers; None: the gold one.
        rewards: of each answer [Y], for the method `reward`.
    """
    found = []
    for one in written:
        z, own = one if isinstance(one, tuple) else (one, 0)
        likelihoods = [
            Gold(sum(agent.numbers[place] for place in places(x, z, y)[1]), len(WORDS[y]))
            for y in golds or [GOLD[x]]
        ]
        ratio = log_ratio(sampled(agent, x, z, own, by=by), with_answer=config.method == "reward")
        reward = 0.0 if rewards is None else rewards[own]
        found.append(Scored.of(likelihoods, reward=reward, log_ratio=ratio))
    return found


def log_w(
    agent: Agent,
    x: int,
    written: Sequence[int | tuple[int, int]],
    *,
    by: Agent | None = None,
    golds: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None,
    **weighting: object,
) -> np.ndarray:
    """log w of a question's samples; see `score`. Ratios count where there is another proposal, unless told otherwise.

    Args:
        weighting: keys of the configuration's section.
    """
    config = weighting_of(by, **weighting)
    return log_weights(score(agent, x, written, config, by=by, golds=golds, rewards=rewards), config)


def weighting_of(by: Agent | None, **weighting: object) -> WeightingConfig:
    return WeightingConfig.model_validate(
        {"correct_proposal": by is not None, "max_ratio": NO_CLIP} | weighting
    )


def even_log_w(agent: Agent, x: int, **weighting: Any) -> np.ndarray:
    """log w of `EVENLY`, as `untrained` samples it, by `weighting`."""
    return log_w(agent, x, EVENLY, by=untrained(), **weighting)


class MStep:
    """The M-step of some weighted samples: what the project's loss makes of them, as a function of theta.

    Args:
        samples: (x, z, y), the answer that is trained behind z; with log w.
    """

    def __init__(self, samples: Sequence[tuple[int, int, int]], log_weights: Sequence[float]) -> None:
        blank = untrained()
        self.examples = [
            Example.of(sampled(blank, x, z, y), log_weight=float(log_weight))
            for (x, z, y), log_weight in zip(samples, log_weights, strict=True)
        ]
        weighted = zip(log_weights, self.examples, strict=True)
        self.weight = sum(math.exp(log_weight) * example.num_targets for log_weight, example in weighted)
        """sum w n: what the loss is divided by."""
        targets = [[place for part in places(*sample) for place in part] for sample in samples]
        self.targets = torch.tensor([place for of_one in targets for place in of_one])
        """Where `log_p` has what is trained, one example behind the other."""
        prepared = WeightedNll().prepare(self.examples)
        self._normaliser = float(sum(prepared.sizes))
        self._rows = Rows(
            example_of_target=torch.tensor([k for k, of_one in enumerate(targets) for _ in of_one]),
            unit=torch.tensor([x for x, _, _ in samples]),
            numbers={
                name: torch.tensor(values, dtype=torch.float64) for name, values in prepared.streams.items()
            },
            streams={},
        )

    def loss(self, theta: Tensor) -> Tensor:
        """The project's loss of all samples as one optimiser step."""
        outputs = Outputs(Agent(theta).log_p[self.targets])
        return WeightedNll().terms(outputs, self._rows, self._normaliser).loss

    def surrogate(self, theta: Tensor) -> float:
        """sum_k w_k log p(z_k, y | x; theta), by the loss."""
        return -self.weight * self.loss(theta).item()

    def ascent(self, theta: Tensor) -> Tensor:
        """sum_k w_k grad log p(z_k, y | x; theta), by the loss."""
        theta = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(theta), theta)
        return -self.weight * gradient


def even_m_step(agent: Agent, **weighting: Any) -> MStep:
    """Of `EVENLY` for every question, with the gold answer in place."""
    samples = [(x, z, GOLD[x]) for x in range(QUESTIONS) for z in EVENLY]
    return MStep(samples, [w for x in range(QUESTIONS) for w in even_log_w(agent, x, **weighting)])


def gradient(value: Tensor, theta: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, theta, retain_graph=True)
    return found


def pairs() -> list[tuple[int, int]]:
    """Trajectories with answers of their own, as often as `untrained` writes them."""
    return list(product(EVENLY, EVENLY))
