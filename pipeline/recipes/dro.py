"""Direct Retrieval-augmented Optimization (DRO; Shi et al. 2025, arXiv 2505.03075): a list-wise selector of passages
and a generator of answers, each trained on what the other makes of it.

    selector_0, generator_0 <- formats only: random selections, and the answer behind what they chose
    for t = 1 .. N, until dev no longer improves:
        sample m selections z_1..z_m ~ p(z | x; selector_{t-1}) of the candidates of every training question x
        w_k <- p(y | x, d_{z_k}; generator_{t-1}) / sum_j p(y | x, d_{z_j}; generator_{t-1})          (Eq. 19)
        selector_t  <- argmax sum_k w_k log p(z_k | x)                                                (Eq. 10)
        generator_t <- argmax sum_k w_k log p(y | x, d_{z_k})                                         (Eq. 11)

The generator reads the chosen passages in the order in which the selector named them. The candidates are what the
retriever, which is not trained, finds for the question itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.core.agents.program import Answering, Sampling, derive_seed
from pipeline.core.agents.selection import (
    GENERATOR,
    SELECTOR,
    SelectThenAnswer,
    answer_prompt,
    select_prompt,
    selection_ids,
)
from pipeline.core.config import AgentConfig, Config, Iterations, OnDisk, WeightingConfig
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.policies import PolicySpec
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.report import Column, Outcome, best_iteration, step_outcome
from pipeline.core.run import Json
from pipeline.core.weighing import (
    GoldAnswers,
    Weighted,
    renderer_at,
    statistics_of,
    summarise_scored,
    weights_of,
)
from pipeline.core.weighting import Scored, trained_gold
from pipeline.iterations import iterate
from pipeline.opening import open_run
from pipeline.run import Run
from retriever_service import interrupts
from retriever_service.errors import RetrieverError
from retriever_service.passages.hits import Hit

logger = logging.getLogger(__name__)


class Settings(Iterations):
    """A selector and a generator (recipe `dro`); how a passage is shown is in `agent`."""

    selector: Annotated[str | None, OnDisk()] = None
    """Model that the selector starts from. Null: `model.path`."""
    generator: Annotated[str | None, OnDisk()] = None
    """Model that the generator starts from. Null: `model.path`."""
    candidates: int = Field(20, ge=2)
    """Passages that the selector chooses from (the paper: 20)."""
    chosen: int = Field(5, ge=1)
    """Passages that it chooses, in an order (the paper: 5)."""
    permutations: int = Field(8, ge=2)
    """m: selections sampled per question (the paper: 8)."""
    start_epochs: int = Field(1, ge=0)
    """Passes over the training questions that teach both models their formats. 0: they know them."""
    start_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of those passes; null: the learner's."""

    def most_samples(self, samples: int) -> int:
        return self.permutations


COLUMNS = (
    Column("bound", "sample.likelihood_bound", 2, "sample.likelihood_bound_stderr", if_null="-inf"),
    Column("ESS", "sample.effective_sample_size", 2),
    Column("dev EM", "evaluation.scores.em"),
    Column("dev F1", "evaluation.scores.f1"),
    Column("recall@k", "evaluation.scores.gold_recall"),
    Column("sample s", "sample.seconds", 0),
    Column("train s", "selector/train.seconds", 0),
)


_POSTERIOR = WeightingConfig(method="posterior")


@dataclass(frozen=True, slots=True)
class PermutationWeights:
    """A question's well-formed selections, weighted against each other by what the generator makes of them."""

    agent: AgentConfig
    generator: str

    outputs = (SELECTOR, GENERATOR)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        renderer = renderer_at(self.generator, self.agent)
        golds = GoldAnswers.of(task, renderer)
        chosen = [
            (selection, answer, golds.behind(answer))
            for episode in episodes
            if episode.failure is None
            for selection, answer in [episode.turns]
            if selection.stop_reason is StopReason.ANSWERED
        ]
        usable = [one for one in chosen if one[2]]
        scored = [Scored.of(list(scores.values())) for _, _, scores in usable]
        logs = weights_of(scored, _POSTERIOR)
        rows = list(zip(usable, logs or (), strict=logs is not None))
        return Weighted(
            {
                SELECTOR: [Example.of(selection, log_weight=weight) for (selection, _, _), weight in rows],
                GENERATOR: [
                    renderer.with_gold_answer(answer, trained_gold(scores, _POSTERIOR), weight)
                    for (_, answer, scores), weight in rows
                ],
            },
            statistics_of(
                scored,
                logs,
                [episode.failure or episode.turns[0] for episode in episodes],
                too_long=len(chosen) - len(usable),
            ),
        )

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return summarise_scored(statistics, _POSTERIOR)


def answering(config: Config) -> Answering:
    """The selector chooses, the generator answers."""
    own: Settings = config.of_recipe
    starts = {SELECTOR: own.selector, GENERATOR: own.generator}
    models = {name: path or config.model.path for name, path in starts.items()}
    return Answering(SelectThenAnswer(config.agent, own.candidates, own.chosen), models, GENERATOR)


def policies(config: Config) -> list[PolicySpec]:
    """Selector and generator."""
    return [
        PolicySpec(name, config.model.at(path), config.rollout, config.learner, seed=config.seed)
        for name, path in answering(config).models.items()
    ]


def check(config: Config) -> None:
    """
    Raises:
        UserError: settings with which the method is not what it says.
    """
    settings: Settings = config.of_recipe
    if settings.chosen > settings.candidates:
        raise UserError(
            f"dro.chosen ({settings.chosen}) is more than dro.candidates ({settings.candidates}), of which they are "
            "chosen; lower the first or raise the second"
        )
    if config.agent.layout == "chat" and not config.agent.instructions:
        raise UserError(
            "agent.layout: chat would tell selector and generator how to search, which neither does; say in "
            "agent.instructions what they are to do, or use agent.layout=plain"
        )


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run."""
    check(config)
    settings: Settings = config.of_recipe
    program = SelectThenAnswer(config.agent, settings.candidates, settings.chosen)
    models = answering(config).models
    splits = load_splits(config.data, config.seed, required=("train", "dev"))
    loss, rollout = WeightedNll(config.learner.negligible_weight), config.rollout
    with open_run(config, run_path, display, splits, policies(config)) as run:

        def roles(t: int) -> dict[str, int]:
            return dict.fromkeys(models, t)

        if settings.start_epochs:
            run.make_examples("0/formats", list(models), lambda: teach_formats(run, settings, models))
            epochs, rate = settings.start_epochs, settings.start_learning_rate
            for name in models:
                seed = derive_seed(config.seed, name, 0)
                run.train(0, name, loss, seed=seed, epochs=epochs, learning_rate=rate)
        run.test("start", program, roles(0), answers=GENERATOR)

        def train_all(t: int) -> None:
            for name in models:
                run.train(t, name, loss, seed=derive_seed(config.seed, name, t))

        iterate(
            run,
            settings,
            lambda t: run.begin_evaluation(t, program, roles(t), answers=GENERATOR),
            lambda t, version: run.begin_sampling(
                t,
                replace(program, scores_answers=True),
                roles(version),
                PermutationWeights(config.agent, models[GENERATOR]),
                samples=settings.permutations,
                sampling=Sampling.of(rollout, derive_seed(config.seed, "sample", t)),
            ),
            train_all,
        )
        run.test("best", program, roles(best_iteration(run.files, settings)), answers=GENERATOR)
        return step_outcome(run.report(settings), COLUMNS)


def teach_formats(
    run: Run, settings: Settings, tokenizers: Mapping[str, str]
) -> tuple[dict[str, list[Example]], Json]:
    """Examples of a random selection and of the gold answer behind it, one of each per training question.

    No supervision but the answers: what to choose is left for the iterations to discover. Questions whose search is
    refused, or answered with what makes no sense, are skipped and counted.
    """
    agent = run.config.agent
    selector, generator = (renderer_at(tokenizers[name], agent) for name in (SELECTOR, GENERATOR))
    examples: dict[str, list[Example]] = {SELECTOR: [], GENERATOR: []}

    async def candidates(question: Question) -> Sequence[Hit] | None:
        try:
            return await run.cluster.retrieve(question.text, settings.candidates)
        except RetrieverError as error:
            logger.warning(f"question {question.id} teaches no formats: {error}")
            return None

    async def all_candidates() -> list[Sequence[Hit] | None]:
        return await asyncio.gather(*map(candidates, run.splits.train))

    for question, hits in zip(run.splits.train, interrupts.run(all_candidates()), strict=True):
        if hits is None:
            continue
        rng = np.random.default_rng(derive_seed(run.config.seed, "formats", question.id))
        order = rng.permutation(len(hits))[: settings.chosen]
        selection = selection_ids(agent, selector.tokenizer, order.tolist())
        prompt = select_prompt(agent, selector.tokenizer, question, hits)
        examples[SELECTOR].append(Example.supervised(question.id, SELECTOR, prompt, selection))
        prompt = answer_prompt(agent, generator.tokenizer, question, [hits[i] for i in order])
        answer = generator.answer_ids(question.answers[0])
        examples[GENERATOR].append(Example.supervised(question.id, GENERATOR, prompt, answer))
    questions = len(examples[SELECTOR])
    return examples, {"questions": questions, "skipped": len(run.splits.train) - questions}
