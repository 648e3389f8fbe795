"""Group-relative policy optimisation (GRPO; Shao et al. 2024, arXiv 2402.03300), with what Dr. GRPO and DAPO changed.

    theta_0 <- cold start, as in ExSearch
    for t = 1 .. N:
        sample z_1..z_K ~ p(z | x; theta_{t-1}) for some training questions x, with a real retriever
        A_k <- (r_k - mean r) / std r, over the K trajectories of x; r_k is a metric of the trajectory's own answer, or
               what a function of the user's gives it
        theta_t <- some steps of the clipped-ratio policy gradient from theta_{t-1}, on the tokens that the model wrote

Ratios are to the log-probabilities with which the engines sampled. Where ExSearch weighs a trajectory by how likely it
makes the gold answer, here nothing counts but what it came to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline.cold_start import ColdStart
from pipeline.core.agents.program import Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config, Iterations
from pipeline.core.config.method import RewardName
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.losses.policy_gradient import ClippedRatio, MeanOver
from pipeline.core.policies import PolicySpec
from pipeline.core.records import (
    Episode,
    Example,
    Numbers,
    Question,
    StopReason,
    Trajectory,
    count_stop_reasons,
)
from pipeline.core.report import STEPS_OF_A_SEARCHER, Column, Outcome, best_iteration, step_outcome
from pipeline.core.rewards import check_reward, reward_of
from pipeline.core.scoring.answers import ProtocolName, score_answer
from pipeline.core.weighing import Weighted
from pipeline.iterations import iterate
from pipeline.opening import open_run
from pipeline.steps import Begun

REWARD = "grpo.reward"
Scale = Literal["std", "none"]


class Settings(Iterations):
    """GRPO over a question's own trajectories (recipe `grpo`)."""

    reads = ("cold_start",)

    iterations: int = Field(20, ge=0)
    """Iterations; each is one sampling, and a training of several steps on it."""
    questions_per_step: int | None = Field(None, ge=1)
    """Training questions of an iteration, at most: all of them, in a new order each time, are spread evenly over
    as many iterations as that takes. Null: all in every iteration."""
    evaluate_every: int = Field(1, ge=1)
    """Score the dev questions after every so many iterations, and after the last one."""
    reward: RewardName = "f1"
    """em, f1 or accuracy of the trajectory's own answer, by `evaluation.protocol`, or a function of your own, as
    module:function (docs/rewards.md)."""
    scale: Scale = "std"
    """An advantage is the reward less the mean of the question's K. std: divided by their standard deviation (GRPO).
    none: not divided (Dr. GRPO)."""
    mean_over: MeanOver = "group"
    """What the loss is a mean of. group: the tokens of a question's trajectories, then the questions (DAPO). sequence:
    the tokens of a trajectory, then the trajectories (GRPO). step: all tokens of an optimiser step."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """A token gains nothing more where its ratio p / p_old is below 1 by this."""
    clip_high: float = Field(0.2, gt=0)
    """The same above 1 (DAPO: 0.28)."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the estimated KL divergence from iteration 0, whose model each rank then holds as well. 0: none."""

    def sampled_questions(self, training: int) -> int:
        """Those of one iteration, at most."""
        return min(training, self.questions_per_step or training)

    def questions_of(self, t: int, training: Sequence[Question], seed: int) -> Sequence[Question]:
        """Those of iteration t, from 1: none comes again before all have come."""
        if self.questions_per_step is None:
            return training
        iterations = math.ceil(len(training) / self.questions_per_step)
        epoch, place = divmod(t - 1, iterations)
        order = np.random.default_rng(derive_seed(seed, "questions", epoch)).permutation(len(training))
        return [training[i] for i in np.array_split(order, iterations)[place]]

    def is_evaluated(self, t: int) -> bool:
        """Whether the dev questions are scored after iteration t."""
        return t % self.evaluate_every == 0 or t == self.iterations


COLUMNS = (
    Column("reward", "sample.reward", 3),
    Column("groups", "sample.groups", 0),
    Column("equal", "sample.equal_groups", 0),
    *STEPS_OF_A_SEARCHER,
)
LEGEND = (
    "reward: mean of what was sampled; groups: questions whose trajectories differ in reward; equal: those whose\n"
    "trajectories do not, and teach nothing; * best"
)


def advantages_of(rewards: Sequence[float], scale: Scale) -> Numbers:
    """[K], of a group of K >= 2 rewards: 0 on average, and all exactly 0 where the rewards are equal.

    The standard deviation is that of a sample, with K - 1 below.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if np.ptp(values) == 0:
        return np.zeros_like(values)
    centred: Numbers = values - values.mean()
    return centred / float(values.std(ddof=1)) if scale == "std" else centred


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """A question's usable trajectories as they are, each with its advantage over the others."""

    reward: str
    scale: Scale
    protocol: ProtocolName

    outputs = (SEARCHER,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        turns = [episode.turn(SEARCHER) for episode in episodes]
        usable = [turn for turn in turns if not turn.stop_reason.is_infrastructure]
        rewards = [self.reward_of(task, turn) for turn in usable]
        examples = []
        if len(rewards) > 1:
            examples = [
                # What the model did not write has no log-probability, and is no target.
                Example.of(
                    turn, advantage=advantage, old_logprob=np.where(turn.loss_mask, turn.logprobs, 0.0)
                )
                for turn, advantage in zip(usable, advantages_of(rewards, self.scale), strict=True)
            ]
        return Weighted({SEARCHER: examples}, {"rewards": rewards, "stop_reasons": count_stop_reasons(turns)})

    def reward_of(self, task: Question, turn: Trajectory) -> float:
        """
        Raises:
            UserError: a function of the user's gives none.
        """
        score = score_answer(turn.answer, task.answers, self.protocol)
        return reward_of(REWARD, self.reward, task, turn, score)

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Groups that differ and that do not, and among those the ones whose rewards are all 1, a metric's highest."""
        stops: Counter[str] = Counter()
        for row in statistics:
            stops.update(row["stop_reasons"])
        alone = sum(len(row["rewards"]) == 1 for row in statistics)
        groups = [row["rewards"] for row in statistics if len(row["rewards"]) > 1]
        if not groups:
            raise RunError(f"no question has two trajectories to compare; how they stopped: {dict(stops)}")
        equal = [rewards[0] for rewards in groups if len(set(rewards)) == 1]
        return {
            "reward": float(np.mean([reward for rewards in groups for reward in rewards])),
            "groups": len(groups) - len(equal),
            "equal_groups": len(equal),
            "solved_groups": equal.count(1.0),
            "excluded": alone + sum(stops[reason] for reason in StopReason if reason.is_infrastructure),
            "excluded_nothing_to_compare": alone,
            "stop_reasons": dict(stops),
        }


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings of other sections with which the method is not what it says.
    """
    check_reward(REWARD, config.of_recipe.reward)
    rollout = config.rollout
    if rollout.samples < 2:
        raise UserError(
            f"the recipe grpo compares the trajectories of a question with each other and needs rollout.samples of at "
            f"least 2, not {rollout.samples}"
        )
    if not Sampling.of(rollout, config.seed).is_from_the_model:
        raise UserError(
            f"the recipe grpo needs samples of the model itself, to whose log-probabilities its ratios are: set "
            f"rollout.temperature=1 (it is {rollout.temperature:g}), top_p=1 ({rollout.top_p:g}) and top_k=0 "
            f"({rollout.top_k})"
        )
    if config.cold_start.mix:
        raise UserError(
            "cold_start.mix adds weighted examples, and the recipe grpo has no weights: remove it"
        )


def policies(config: Config) -> list[PolicySpec]:
    """The searcher, whose ranks hold its iteration 0 as well where the divergence from that counts."""
    return [
        PolicySpec(
            SEARCHER,
            config.model,
            config.rollout,
            config.learner,
            keeps_reference=config.of_recipe.kl_coefficient > 0,
            seed=config.seed,
        )
    ]


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    rollout, seed = config.rollout, config.seed
    splits = load_splits(config.data, seed, required=("train", "dev"), apart=config.cold_start.sources)
    cold_start = ColdStart(config, splits)
    program = SearchProgram(config.agent)
    weigh = GroupAdvantages(settings.reward, settings.scale, config.evaluation.protocol)
    with open_run(config, run_path, display, splits, policies(config)) as run:
        cold_start(run)
        run.test("start", program, {SEARCHER: 0}, answers=SEARCHER)
        loss = ClippedRatio(
            settings.clip_low,
            settings.clip_high,
            settings.kl_coefficient,
            settings.mean_over,
            reference=run.snapshot(SEARCHER, 0).model if settings.kl_coefficient else None,
        )

        def evaluate(t: int) -> Begun:
            if not settings.is_evaluated(t):
                return Begun(dict)
            return run.begin_evaluation(t, program, {SEARCHER: t}, answers=SEARCHER)

        iterate(
            run,
            settings,
            evaluate,
            lambda t, version: run.begin_sampling(
                t,
                SearchProgram(config.agent, keeps_mistakes=True),
                {SEARCHER: version},
                weigh,
                samples=rollout.samples,
                sampling=Sampling.of(rollout, derive_seed(seed, "sample", t)),
                questions=settings.questions_of(t, splits.train, seed),
            ),
            lambda t: run.train(t, SEARCHER, loss, seed=derive_seed(seed, "train", t)),
        )
        run.test("best", program, {SEARCHER: best_iteration(run.files, settings)}, answers=SEARCHER)
        return step_outcome(run.report(settings), COLUMNS, LEGEND)
