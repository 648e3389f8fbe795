"""Preferences between a question's own trajectories: DPO, iterated on-policy.

    theta_0 <- cold start, as in ExSearch; the reference is theta_0, frozen
    for t = 1 .. N:
        sample z_1..z_K ~ p(z | x; theta_{t-1}) for every training question x, with a real retriever
        chosen, rejected <- the trajectories with the highest and the lowest p(y | x, z)
        theta_t <- argmin -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), ratios to the reference

Where ExSearch raises what led to the answer, this also lowers what did not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.cold_start import ColdStart
from pipeline.core.agents.program import EngineError, Model, Retrieve, Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config, Iterations
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.losses.preference import Dpo
from pipeline.core.policies import PolicySpec
from pipeline.core.records import Episode, Example, Question, StopReason, count_stop_reasons
from pipeline.core.report import STEPS_OF_A_SEARCHER, Column, Outcome, best_iteration, step_outcome
from pipeline.core.weighing import Weighted, logs_from_json
from pipeline.core.weighting import log_mean, log_sum
from pipeline.iterations import iterate
from pipeline.opening import open_run

REFERENCE = "reference"


class Settings(Iterations):
    """DPO over a question's own trajectories (recipe `preference`)."""

    reads = ("cold_start",)

    iterations: int = Field(3, ge=0)
    """Iterations of sampling and training."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    nll_coefficient: float = Field(0.0, ge=0)
    """Weight of the chosen trajectory's mean negative log-likelihood, beside the preference."""
    least_gap: float = Field(1.0, gt=0)
    """A pair counts if log p(y|x,z) of its members differs by at least this much, in nats."""


COLUMNS = (
    Column("bound", "sample.log_likelihood", 2),
    Column("pairs", "sample.pairs", 0),
    Column("accuracy", "searcher/train.accuracy", 2),
    *STEPS_OF_A_SEARCHER,
)
LEGEND = (
    "bound: mean log p(answer); pairs: questions with two trajectories far enough apart; accuracy: share of\n"
    "pairs that training ranks rightly; * best"
)


@dataclass(frozen=True, slots=True)
class SearchWithReference:
    """A trajectory of the searcher, and its log-probability under the reference."""

    search: SearchProgram

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        episode = await self.search(task, roles, retrieve, sampling=sampling, sample=sample)
        (trajectory,) = episode.turns
        own = np.flatnonzero(trajectory.loss_mask)
        if episode.failure is not None or not len(own):
            return episode
        first = int(own[0])
        try:
            logprobs = await roles[REFERENCE].token_logprobs(trajectory.token_ids.tolist(), first)
        except EngineError as error:
            failed = replace(trajectory, stop_reason=StopReason.ENGINE_ERROR, detail=str(error))
            return replace(episode, turns=(failed,))
        return replace(episode, scores={"reference_logprob": float(np.asarray(logprobs)[own - first].sum())})


@dataclass(frozen=True, slots=True)
class Pairs:
    """Of a question's trajectories the best against the worst, if they are far enough apart."""

    least_gap: float

    outputs = (SEARCHER,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        likelihoods = {
            episode.sample: log_sum(turn.log_likelihoods)
            for episode in episodes
            if "reference_logprob" in episode.scores
            and not np.isnan((turn := episode.turn(SEARCHER)).log_likelihoods).any()
        }
        best, worst = (pick(likelihoods, key=likelihoods.__getitem__, default=None) for pick in (max, min))
        examples: list[Example] = []
        if (
            best is not None
            and worst is not None
            and likelihoods[best] - likelihoods[worst] >= self.least_gap
        ):
            examples = [
                Example.of(
                    episodes[sample].turn(SEARCHER),
                    label=label,
                    reference_logprob=episodes[sample].scores["reference_logprob"],
                )
                for sample, label in ((best, 1.0), (worst, -1.0))
            ]
        turns = [episode.turn(SEARCHER) for episode in episodes]
        return Weighted(
            {SEARCHER: examples},
            {
                "log_likelihoods": list(likelihoods.values()),
                "pairs": len(examples) // 2,
                "stop_reasons": count_stop_reasons(turns),
            },
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        if not any(row["pairs"] for row in statistics):
            raise RunError("no question has two trajectories that differ enough; see preference.least_gap")
        means = [
            log_mean(logs_from_json(row["log_likelihoods"])) for row in statistics if row["log_likelihoods"]
        ]
        stops: Counter[str] = Counter()
        for row in statistics:
            stops.update(row["stop_reasons"])
        pairs = sum(row["pairs"] for row in statistics)
        return {"log_likelihood": float(np.mean(means)), "pairs": pairs, "stop_reasons": dict(stops)}


def policies(config: Config) -> list[PolicySpec]:
    """The searcher, and the reference with an engine that scores."""
    rollout = config.rollout
    return [
        PolicySpec(SEARCHER, config.model, rollout, config.learner, seed=config.seed),
        PolicySpec(REFERENCE, config.model, rollout.with_one()),
    ]


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings of other sections with which the method is not what it says.
    """
    if config.rollout.samples < 2:
        raise UserError(
            "the recipe preference compares the trajectories of a question with each other and needs rollout.samples "
            f"of at least 2, not {config.rollout.samples}"
        )
    if config.cold_start.mix:
        raise UserError(
            "cold_start.mix adds weighted examples, and the recipe preference has no weights: remove it"
        )


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    rollout = config.rollout
    splits = load_splits(config.data, config.seed, required=("train", "dev"), apart=config.cold_start.sources)
    cold_start = ColdStart(config, splits)
    program = SearchProgram(config.agent)
    with open_run(config, run_path, display, splits, policies(config)) as run:
        cold_start(run)
        run.freeze(REFERENCE, run.snapshot(SEARCHER, 0))
        run.test("start", program, {SEARCHER: 0}, answers=SEARCHER)
        loss = Dpo(settings.beta, settings.nll_coefficient)
        iterate(
            run,
            settings,
            lambda t: run.begin_evaluation(t, program, {SEARCHER: t}, answers=SEARCHER),
            lambda t, version: run.begin_sampling(
                t,
                SearchWithReference(SearchProgram(config.agent, score_answers=True, keeps_mistakes=True)),
                {SEARCHER: version, REFERENCE: 0},
                Pairs(settings.least_gap),
                samples=rollout.samples,
                sampling=Sampling.of(rollout, derive_seed(config.seed, "sample", t)),
            ),
            lambda t: run.train(t, SEARCHER, loss, seed=derive_seed(config.seed, "train", t)),
        )
        run.test("best", program, {SEARCHER: best_iteration(run.files, settings)}, answers=SEARCHER)
        return step_outcome(run.report(settings), COLUMNS, LEGEND)
