"""Joint Flashback Adaptation (arXiv 2505.15467) on the EM of ExSearch: learn new tasks, keep old ones.

    theta_0 <- cold start, as in ExSearch; f = theta_0, frozen
    o_1 .. o_n <- prompts of old tasks, each with what f writes behind it, greedily and with a real retriever
    for t = 1 .. N:
        sample z_1..z_K ~ p(z | x; theta_{t-1}) for every training question x of a new task; w_k as in ExSearch
        theta_t <- argmin  L_SFT + alpha L_DIV, with some of the o in every optimiser step
        L_SFT = - sum_k w_k log p(z_k, y | x; theta), L_DIV = mean KL(f || theta) + KL(theta || f), a token of an o

No answer of an old task is known, or needed. With `flashback.project_conflicts` what of one gradient goes against the
other is taken out of it (PCGrad).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.cold_start import ColdStart
from pipeline.core.agents.program import GREEDY, Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config, Iterations
from pipeline.core.copies import copies_of
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.example_files import read_examples, read_outlines
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.policies import PolicySpec
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Episode, Example, Question, count_stop_reasons
from pipeline.core.report import STEPS_OF_A_SEARCHER, Column, Outcome, best_iteration, step_outcome
from pipeline.core.rewards import check_reward
from pipeline.core.run import write_records
from pipeline.core.weighing import WEIGHTING_REWARD, SearchWeights, Weighted
from pipeline.iterations import iterate
from pipeline.opening import open_run
from pipeline.run import Run

FLASHBACK = "flashback"


class Settings(Iterations):
    """EM that keeps what the model could do before (recipe `flashback`)."""

    reads = ("cold_start", "weighting")

    iterations: int = Field(3, ge=0)
    """Iterations of sampling and training."""
    old_hops: tuple[int, ...] = (1,)
    """Training questions of so many reasoning steps are the old tasks: of them prompts alone are used."""
    prompts: int = Field(32, ge=1)
    """Old questions that are kept in mind (the paper: some 30 of each old task), at most."""
    per_step: int = Field(4, ge=1)
    """Of them so many are in every optimiser step, in turns."""
    coefficient: float = Field(1.0, ge=0)
    """alpha, the weight of the divergence from the old model (the released code: 1). 0: none."""
    project_conflicts: bool = False
    """Take out of each of the two gradients what goes against the other (PCGrad). Needs `learner.zero_stage` of 2 at
    most."""


COLUMNS = (
    Column("bound", "sample.likelihood_bound", 2, "sample.likelihood_bound_stderr", if_null="-inf"),
    Column("KL", "searcher/train.flashback/kl", 3),
    Column("conflicts", "searcher/train.conflicts", 2),
    *STEPS_OF_A_SEARCHER,
)
LEGEND = (
    "bound: mean log p(answer) of the new tasks' questions; KL: from the old model, a token of the old tasks;\n"
    "conflicts: share of the steps in which the gradients went against each other; * best"
)


@dataclass(frozen=True, slots=True)
class Flashbacks:
    """What the old model wrote for the prompt of an old task, as it is."""

    outputs = (FLASHBACK,)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        turns = [episode.turn(SEARCHER) for episode in episodes]
        whole = [turn for turn in turns if not turn.stop_reason.is_infrastructure and turn.loss_mask.any()]
        examples = [replace(Example.of(turn), role=FLASHBACK) for turn in whole]
        return Weighted({FLASHBACK: examples}, {"stop_reasons": count_stop_reasons(turns)})

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"flashbacks": len(statistics)}


def old_and_new(config: Config, training: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Some questions of the old tasks, and all of the new ones.

    Raises:
        UserError: there are none of one kind.
    """
    settings: Settings = config.of_recipe
    old = [question for question in training if question.hops in settings.old_hops]
    new = [question for question in training if question.hops not in settings.old_hops]
    if not old or not new:
        raise UserError(
            f"flashback.old_hops is {list(settings.old_hops)}: of {len(training)} training questions {len(old)} are of "
            f"old tasks and {len(new)} of new ones, and both are needed; name other numbers of reasoning steps, or "
            "give the questions' hops in data.train"
        )
    order = np.random.default_rng(derive_seed(config.seed, FLASHBACK)).permutation(len(old))
    return [old[k] for k in order[: settings.prompts]], new


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings with which the method is not what it says.
    """
    settings: Settings = config.of_recipe
    check_reward(WEIGHTING_REWARD, config.weighting.reward)
    if settings.per_step >= config.learner.batch_size:
        raise UserError(
            f"flashback.per_step ({settings.per_step}) leaves no room for new tasks in learner.batch_size "
            f"({config.learner.batch_size}); lower the first or raise the second"
        )
    if settings.project_conflicts and config.learner.zero_stage == 3:
        raise UserError("flashback.project_conflicts needs learner.zero_stage of 2 at most, and it is 3")
    if config.cold_start.mix:
        raise UserError("cold_start.mix is ExSearch's own way to keep the cold start: remove it here")


def policies(config: Config) -> list[PolicySpec]:
    """The searcher, whose ranks hold its iteration 0 as well."""
    settings: Settings = config.of_recipe
    return [
        PolicySpec(
            SEARCHER,
            config.model,
            config.rollout,
            config.learner,
            records_proposal=config.weighting.correct_proposal,
            keeps_reference=settings.coefficient > 0,
            parts_apart=2 if settings.project_conflicts else 0,
            seed=config.seed,
        )
    ]


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    rollout, seed = config.rollout, config.seed
    splits = load_splits(config.data, seed, required=("train", "dev"), apart=config.cold_start.sources)
    old, new = old_and_new(config, splits.train)
    cold_start = ColdStart(config, splits)
    program = SearchProgram(config.agent)
    nll = WeightedNll(config.learner.negligible_weight, by_token=config.weighting.credit == "turn")
    with open_run(config, run_path, display, splits, policies(config)) as run:
        cold_start(run)
        run.test("start", program, {SEARCHER: 0}, answers=SEARCHER)
        at_start = {SEARCHER: 0}
        run.begin_sampling(
            0, program, at_start, Flashbacks(), samples=1, sampling=GREEDY, questions=old
        ).finish()

        def train_both(t: int) -> None:
            divergence = Divergence("symmetric", reference=run.snapshot(SEARCHER, 0).model)
            # The mean of both directions is half their sum.
            kept = Part(FLASHBACK, divergence, 2 * settings.coefficient) if settings.coefficient else None
            run.train(
                t,
                SEARCHER,
                Joint((Part(SEARCHER, nll), kept), settings.project_conflicts) if kept else nll,
                seed=derive_seed(seed, "m-step", t),
                beside=(lambda shards: [flashbacks_beside(run, settings, t, shards)]) if kept else None,
            )

        iterate(
            run,
            settings,
            lambda t: run.begin_evaluation(t, program, {SEARCHER: t}, answers=SEARCHER),
            lambda t, version: run.begin_sampling(
                t,
                replace(program, score_answers=True, score_turns=config.weighting.scored_turns),
                {SEARCHER: version},
                SearchWeights(config.weighting, config.agent, config.model.path, config.evaluation.protocol),
                samples=rollout.samples,
                sampling=Sampling.of(rollout, derive_seed(seed, "e-step", t)),
                questions=new,
            ),
            train_both,
        )
        run.test("best", program, {SEARCHER: best_iteration(run.files, settings)}, answers=SEARCHER)
        return step_outcome(run.report(settings), COLUMNS, LEGEND)


def flashbacks_beside(run: Run, settings: Settings, t: int, shards: Sequence[Path]) -> Path:
    """A shard with as many flashbacks, in turns, as the optimiser steps over the weighted examples of t take.

    Raises:
        RunError: none was sampled.
    """
    kept = [example for shard in run.shards(0, FLASHBACK) for example in read_examples(shard)]
    if not kept:
        raise RunError("the old model wrote nothing for any prompt of an old task: there is nothing to keep")
    weighted = sum(copies_of(outline) for shard in shards for outline in read_outlines(shard))
    steps = math.ceil(weighted / (run.config.learner.batch_size - settings.per_step))
    order = np.random.default_rng(derive_seed(run.config.seed, FLASHBACK, t)).permutation(len(kept))
    chosen = [kept[order[n % len(kept)]] for n in range(steps * settings.per_step)]
    in_turns = [replace(one, id=f"{FLASHBACK}/{n}", unit=f"{FLASHBACK}/{n}") for n, one in enumerate(chosen)]
    path = run.fresh(f"{t}/{SEARCHER}/{FLASHBACK}s") / "000000.parquet"
    write_records(path, examples_to_table(in_turns))
    return path
