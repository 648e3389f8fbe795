"""ExSearch: generalised EM for search agents. This file is the algorithm; everything else serves it.

    theta_0 <- cold start of the base model on synthesised trajectories
    for t = 1 .. N:
        E-step   sample z_1..z_K ~ p(z | x; theta_{t-1}) for every training question x, with a real retriever;
                 w_k from log p(y | x, z_k; theta_{t-1})
        M-step   theta_t <- argmax sum_k w_k log p(z_k, y | x; theta), on the tokens that the model wrote
        push     theta_t -> the engines
        dev      greedy evaluation; stop early if it no longer improves
    test the best theta_t, beside the base model, the cold start and the one-search baseline

The dev questions of theta_t are answered beside those of the next E-step, which needs the same weights. With
`em.asynchronous` the E-step of t + 1 goes on beside the M-step of t, and samples from theta_{t-1}.

Iteration 0 is the cold start. Version t of the policy `searcher` is theta_t; where there is a cold start, version -1 is
the base model, else version 0 is. Steps that the run directory has finished are skipped, so the same command resumes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cold_start import ColdStart
from pipeline.core.agents.program import Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import FurtherSamples, SearchProgram
from pipeline.core.config import Config, WeightingConfig
from pipeline.core.copies import CREDIT, copies_of
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.example_files import read_examples, read_outlines
from pipeline.core.losses.likelihood import WeightedNll, average_log_weight
from pipeline.core.policies import PolicySpec
from pipeline.core.record_tables import examples_to_table
from pipeline.core.report import Outcome, best_iteration
from pipeline.core.rewards import check_reward
from pipeline.core.run import Json, write_json, write_records
from pipeline.core.weighing import WEIGHTING_REWARD, SearchWeights
from pipeline.em_report import em_report, outcome_of
from pipeline.iterations import iterate
from pipeline.opening import open_run
from pipeline.run import Run
from pipeline.steps import Begun, together

PLAIN = {
    "method": "likelihood",
    "self_normalised": False,
    "reward": "f1",
    "credit": "trajectory",
    "subtract_baseline": False,
}
"""Weights of which the bound is all that is looked at."""


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one training run.

    Raises:
        UserError: bad input, before anything expensive.
    """
    check_reward(WEIGHTING_REWARD, config.weighting.reward)
    splits = load_splits(
        config.data,
        config.seed,
        required=("train", "dev") if config.em.iterations else (),
        apart=config.cold_start.sources,
    )
    cold_start = ColdStart(config, splits)
    with open_run(config, run_path, display, splits, [searcher_of(config)]) as run:
        return outcome_of(ExpectationMaximisation(run, cold_start).run_all())


def searcher_of(config: Config) -> PolicySpec:
    """The one policy of ExSearch."""
    return PolicySpec(
        SEARCHER,
        config.model,
        config.rollout,
        config.learner,
        records_proposal=config.weighting.correct_proposal,
        seed=config.seed,
    )


class ExpectationMaximisation:
    """One run: the algorithm above, step by step."""

    def __init__(self, run: Run, cold_start: ColdStart) -> None:
        self.run, self.config = run, run.config
        self.cold_start = cold_start

    @property
    def _by_turn(self) -> bool:
        return self.config.weighting.credit == "turn"

    def run_all(self) -> Json:
        em, starts_cold = self.config.em, self.cold_start.base_version < 0
        if starts_cold:
            self.test("base", -1)
        self.cold_start(self.run)
        self.test("cold_start" if starts_cold else "base", 0)
        if self.config.evaluation.baselines:
            self.test("no_search", 0, think=False, search=False, record=False)
            self.test("one_search", 0, think=False)
        iterate(self.run, em, self.begin_dev, self.begin_e_step, self.m_step, self.report)
        self.test("best", best_iteration(self.run.files, em))
        return self.report()

    # ---------------------------------------------------------------- the steps

    def begin_e_step(self, t: int, version: int) -> Begun:
        """Trajectories of theta_version and their weights, for the M-step of t."""
        config, rollout, further = self.config, self.config.rollout, self.config.em.further_samples
        return self.run.begin_sampling(
            t,
            SearchProgram(
                config.agent,
                score_answers=True,
                score_turns=config.weighting.scored_turns,
                hinted=config.em.hinted,
            ),
            {SEARCHER: version},
            self._weights(
                config.weighting, hinted=config.em.hinted, usual=rollout.samples if further else None
            ),
            samples=rollout.samples,
            sampling=Sampling.of(rollout, derive_seed(config.seed, "e-step", t)),
            further=FurtherSamples(further, config.em.hinted) if further else None,
        )

    def _weights(
        self, weighting: WeightingConfig, *, hinted: int = 0, usual: int | None = None
    ) -> SearchWeights:
        config, protocol = self.config, self.config.evaluation.protocol
        return SearchWeights(weighting, config.agent, config.model.path, protocol, hinted=hinted, usual=usual)

    def m_step(self, t: int) -> None:
        """theta_t: weighted maximum likelihood on the E-step's shards, from theta_{t-1} on."""
        mixes = self.config.cold_start.mix > 0
        self.run.train(
            t,
            SEARCHER,
            WeightedNll(self.config.learner.negligible_weight, by_token=self._by_turn),
            seed=derive_seed(self.config.seed, "m-step", t),
            beside=(lambda shards: [self.mixed_in(t, shards)]) if mixes else None,
        )

    def mixed_in(self, t: int, shards: Sequence[Path]) -> Path:
        """A shard of cold-start examples beside the weighted ones, with their average weight per trained token."""
        weighted = [outline for shard in shards for outline in read_outlines(shard)]
        (first,) = self.run.shards(0, SEARCHER)
        copies = [copies_of(outline) for outline in weighted]
        log_weight = average_log_weight(
            [outline.number("log_weight") for outline in weighted],
            [outline.num_targets for outline in weighted],
            copies,
        )
        streams = {"log_weight": np.array([log_weight])} | ({CREDIT: np.ones(1)} if self._by_turn else {})
        rng = random.Random(derive_seed(self.config.seed, "mix", t))
        chosen = rng.choices(read_examples(first), k=round(self.config.cold_start.mix * sum(copies)))
        mixed = [
            replace(example, id=f"mix/{n}", unit=f"mix/{n}", streams=streams)
            for n, example in enumerate(chosen)
        ]
        path = self.run.fresh(f"{t}/{SEARCHER}/cold_start") / "000000.parquet"
        write_records(path, examples_to_table(mixed))
        return path

    def begin_dev(self, t: int) -> Begun:
        """Push theta_t and evaluate it on the dev questions; with `em.dev_samples` find its bound there as well."""
        config, roles = self.config, {SEARCHER: t}
        evaluation = self.run.begin_evaluation(t, SearchProgram(config.agent), roles, answers=SEARCHER)
        if not config.em.dev_samples:
            return evaluation
        bound = self.run.begin_dev_bound(
            t,
            SearchProgram(config.agent, score_answers=True),
            roles,
            # The bound is the same by every method, and this one has weights of a single trajectory, too.
            self._weights(config.weighting.model_copy(update=PLAIN)),
            samples=config.em.dev_samples,
            sampling=Sampling.of(config.rollout, derive_seed(config.seed, "dev-bound", t)),
        )
        return together(evaluation, bound)

    def test(self, name: str, version: int, **switches: bool) -> None:
        """Evaluate one version on the test questions; `switches` turns it into a baseline."""
        program = SearchProgram(self.config.agent.model_copy(update=switches))
        self.run.test(name, program, {SEARCHER: version}, answers=SEARCHER)
        self.report()

    def report(self) -> Json:
        report = em_report(self.run.files, self.config)
        write_json(self.run.at("report.json"), report)
        return report
