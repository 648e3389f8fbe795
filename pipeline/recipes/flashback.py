"""Joint Flashback Adaptation (arXiv 2505.15467) on the EM of ExSearch: learn new tasks, keep old ones.

    theta_0 <- cold start, as in ExSearch; f = theta_0, frozen
    o_1 .. o_n <- prompts of old tasks, each with what f writes behind it, greedily and with a real retriever
    for t = 1 .. N:
        sample z_1..z_K ~ p(z | x; theta_{t-1}) for every training question x of a new task; w_k as in ExSearch
        theta_t <- argmin  L_SFT + alpha L_DIV, with some of the o in every optimiser step
        L_SFT = - sum_k w_k log p(z_k, y | x; theta), L_DIV = mean KL(f || theta) + KL(theta || f), a token of an o

Of an old task's questions EM needs no answer. With `flashback.project_conflicts` what of one gradient goes against the
other is taken out of it (PCGrad). With `flashback.latent` theta depends on the question: increments of weights that lie
between old and new tasks, and that questions near to each other train together (`pipeline.core.latent_tasks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipeline.cold_start import ColdStart
from pipeline.core.agents.program import GREEDY, Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import Config, Iterations, Section
from pipeline.core.copies import copies_of
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.example_files import read_examples, read_outlines
from pipeline.core.flashbacks import FLASHBACK, Flashbacks, in_turns, old_and_new
from pipeline.core.latent_tasks import (
    LatentTasks,
    gates_between,
    gates_from_table,
    gates_to_table,
    streams_of,
)
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Loss
from pipeline.core.policies import PolicySpec
from pipeline.core.record_tables import examples_to_table
from pipeline.core.records import Numbers, Question
from pipeline.core.report import STEPS_OF_A_SEARCHER, Column, Outcome, best_iteration, step_outcome
from pipeline.core.retrieval import encoder_spec
from pipeline.core.rewards import check_reward
from pipeline.core.run import Json, write_records
from pipeline.core.weighing import WEIGHTING_REWARD, SearchWeights, Weigh, WithStreams
from pipeline.iterations import iterate
from pipeline.opening import open_run
from pipeline.run import Run
from retriever_service.encoding.encoder import Encoder


class Latent(Section):
    tasks: int = Field(24, ge=2)
    """Latent tasks, each on the way from an old question to a new one (the released code: 24)."""
    rank: int = Field(8, ge=1)
    """Rank of the increment that each is (the released code: 8)."""
    nearest: int = Field(2, ge=1)
    """A question trains so many of them, the nearest ones (the released code: 2)."""

    @model_validator(mode="after")
    def _nearest_of_several(self) -> Latent:
        if self.nearest > self.tasks:
            raise ValueError(f"nearest ({self.nearest}) is more than all tasks ({self.tasks})")
        return self


class Settings(Iterations):
    """EM that keeps what the model could do before (recipe `flashback`)."""

    reads = ("cold_start", "weighting")

    iterations: int = Field(3, ge=0)
    """Iterations of sampling and training."""
    old_hops: tuple[int, ...] = (1,)
    """Training questions of so many reasoning steps are the old tasks: EM uses prompts of them alone."""
    prompts: int = Field(32, ge=1)
    """Old questions that are kept in mind (the paper: some 30 of each old task), at most."""
    per_step: int = Field(4, ge=1)
    """Of them so many are in every optimiser step, in turns."""
    coefficient: float = Field(1.0, ge=0)
    """alpha, the weight of the divergence from the old model (the released code: 1). 0: no flashbacks."""
    project_conflicts: bool = False
    """Take out of each of the two gradients what goes against the other (PCGrad). Needs `learner.zero_stage` of 2 at
    most."""
    latent: Latent | None = None
    """Latent tasks, which old and new questions share as far as they are alike. Null: none."""


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


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings with which the method is not what it says.
    """
    settings: Settings = config.of_recipe
    check_reward(WEIGHTING_REWARD, config.weighting.reward)
    if not settings.coefficient and (settings.project_conflicts or settings.latent):
        raise UserError(
            "flashback.coefficient is 0, and without flashbacks there is nothing that flashback.project_conflicts or "
            "flashback.latent could do: remove them, or raise it"
        )
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
    latent = settings.latent
    return [
        PolicySpec(
            SEARCHER,
            config.model,
            config.rollout,
            config.learner,
            records_proposal=config.weighting.correct_proposal,
            keeps_reference=settings.coefficient > 0,
            parts_apart=2 if settings.project_conflicts else 0,
            latent=LatentTasks(latent.tasks, latent.rank) if latent is not None else None,
            seed=config.seed,
        )
    ]


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    rollout, seed, keeps = config.rollout, config.seed, settings.coefficient > 0
    splits = load_splits(config.data, seed, required=("train", "dev"), apart=config.cold_start.sources)
    rng = np.random.default_rng(derive_seed(seed, FLASHBACK))
    old, new = old_and_new(splits.train, settings.old_hops, settings.prompts, rng)
    cold_start = ColdStart(config, splits)
    program = SearchProgram(config.agent)
    with open_run(config, run_path, display, splits, policies(config)) as run:
        cold_start(run)
        run.test("start", program, {SEARCHER: 0}, answers=SEARCHER)
        gates = gates_of_questions(run, settings.latent, old, new) if settings.latent is not None else None

        def gated(weigh: Weigh[Question]) -> Weigh[Question]:
            return weigh if gates is None else WithStreams(weigh, gates)

        if keeps:
            at_start = {SEARCHER: 0}
            run.begin_sampling(
                0, program, at_start, gated(Flashbacks()), samples=1, sampling=GREEDY, questions=old
            ).finish()
        loss = loss_of(config, old_model=run.snapshot(SEARCHER, 0).model)
        weights = SearchWeights(config.weighting, config.agent, config.model.path, config.evaluation.protocol)
        iterate(
            run,
            settings,
            lambda t: run.begin_evaluation(t, program, {SEARCHER: t}, answers=SEARCHER),
            lambda t, version: run.begin_sampling(
                t,
                replace(program, score_answers=True, score_turns=config.weighting.scored_turns),
                {SEARCHER: version},
                gated(weights),
                samples=rollout.samples,
                sampling=Sampling.of(rollout, derive_seed(seed, "e-step", t)),
                questions=new,
            ),
            lambda t: run.train(
                t,
                SEARCHER,
                loss,
                seed=derive_seed(seed, "m-step", t),
                beside=(lambda shards: [flashbacks_beside(run, settings, t, shards)]) if keeps else None,
            ),
        )
        run.test("best", program, {SEARCHER: best_iteration(run.files, settings)}, answers=SEARCHER)
        return step_outcome(run.report(settings), COLUMNS, LEGEND)


def loss_of(config: Config, old_model: str) -> Loss | Joint:
    """L_SFT + alpha L_DIV, in which the old model is that of a directory."""
    settings: Settings = config.of_recipe
    nll = WeightedNll(config.learner.negligible_weight, by_token=config.weighting.credit == "turn")
    if not settings.coefficient:
        return nll
    # The divergence is the mean of both directions, L_DIV their sum.
    kept = Part(FLASHBACK, Divergence("symmetric", reference=old_model), 2 * settings.coefficient)
    return Joint((Part(SEARCHER, nll), kept), settings.project_conflicts)


def gates_of_questions(
    run: Run, latent: Latent, old: Sequence[Question], new: Sequence[Question]
) -> Mapping[str, Mapping[str, Numbers]]:
    """Step "0/latent_tasks": which of them each question trains, as streams of its examples."""
    step = "0/latent_tasks"
    path = run.at(f"{step}.parquet")
    if not path.exists():
        run.files.forget(step)

    def work() -> Json:
        questions = [*old, *new]
        with run.display.status("encoding the questions for the latent tasks"):
            encoder = Encoder.load(encoder_spec(run.config.retriever))
            vectors = encoder.encode_queries([question.text for question in questions])
        rng = np.random.default_rng(derive_seed(run.config.seed, step))
        of_old, of_new = gates_between(
            vectors[: len(old)], vectors[len(old) :], latent.tasks, latent.nearest, rng
        )
        write_records(path, gates_to_table([q.id for q in questions], np.concatenate([of_old, of_new])))
        is_shared = of_old.any(axis=0) & of_new.any(axis=0)
        return {"tasks": latent.tasks, "shared": int(is_shared.sum())}

    run.once(step, work)
    return {name: streams_of(gates) for name, gates in gates_from_table(pq.read_table(path)).items()}


def flashbacks_beside(run: Run, settings: Settings, t: int, shards: Sequence[Path]) -> Path:
    """A shard with as many flashbacks, in turns, as the optimiser steps over the weighted examples of t take."""
    kept = [example for shard in run.shards(0, FLASHBACK) for example in read_examples(shard)]
    weighted = sum(copies_of(outline) for shard in shards for outline in read_outlines(shard))
    config = run.config
    rng = np.random.default_rng(derive_seed(config.seed, FLASHBACK, t))
    path = run.fresh(f"{t}/{SEARCHER}/{FLASHBACK}s") / "000000.parquet"
    beside = in_turns(kept, weighted, settings.per_step, config.learner.batch_size, rng)
    write_records(path, examples_to_table(beside))
    return path
