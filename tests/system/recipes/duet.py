"""A recipe for tests: two models of different architecture and tokenizer take turns, and both are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.agents.program import Answering, Model, Retrieve, Sampling, derive_seed
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import Config, Iterations
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.policies import PolicySpec
from pipeline.core.records import Episode, Example, Question, ScoreRequest, StopReason, Trajectory
from pipeline.core.report import Outcome, step_outcome
from pipeline.core.run import Json
from pipeline.core.weighing import Weighted
from pipeline.opening import open_run

NAMES = ("asker", "answerer")


class Settings(Iterations):
    """Which model answers."""

    answerer: str = ""
    """Model directory."""


@dataclass(frozen=True)
class Duet:
    """Each writes twelve tokens; the second reads what the first wrote, in a tokenizer of its own."""

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        hits = await retrieve(task.text, 1)
        text, turns = f"{hits[0].passage.title}: {task.text}", []
        for name in NAMES:
            model, transcript = roles[name], Transcript()
            transcript.append_environment(model.tokenizer(text)["input_ids"])
            seed = derive_seed(sampling.seed, name)
            completion = await model.generate(
                transcript.token_ids, replace(sampling, max_tokens=12, seed=seed)
            )
            transcript.append_model(completion)
            turns.append(_turn(transcript, task, sample, name, model))
            text += completion.text
        last = roles["answerer"]
        scored = await last.token_logprobs(turns[1].token_ids.tolist(), 1)
        return Episode(task.id, sample, tuple(turns), scores={"log_likelihood": float(sum(scored))})


def _turn(transcript: Transcript, task: Question, sample: int, role: str, model: Model) -> Trajectory:
    return transcript.trajectory(
        question_id=task.id,
        sample=sample,
        role=role,
        policy_version=model.version,
        stop_reason=StopReason.ANSWERED,
    )


@dataclass(frozen=True)
class Ranked:
    """The likelier the answerer finds an episode, the more it weighs."""

    outputs = NAMES

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        order = np.argsort([episode.scores["log_likelihood"] for episode in episodes])
        log_weights = {episodes[int(k)].sample: float(np.log(rank + 1)) for rank, k in enumerate(order)}
        made = {
            name: [Example.of(e.turn(name), log_weight=log_weights[e.sample]) for e in episodes]
            for name in NAMES
        }
        return Weighted(made, {"scores": [e.scores["log_likelihood"] for e in episodes]})

    def summarise(self, statistics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"score": float(np.mean([row["scores"] for row in statistics]))}


def answering(config: Config) -> Answering:
    return Answering(
        Duet(), dict(zip(NAMES, (config.model.path, config.of_recipe.answerer), strict=True)), NAMES[1]
    )


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    settings: Settings = config.of_recipe
    splits = load_splits(config.data, config.seed, required=("train", "dev"))
    answerer = config.model.at(settings.answerer)
    policies = [
        PolicySpec(name, model, config.rollout, config.learner, seed=config.seed)
        for name, model in zip(NAMES, (config.model, answerer), strict=True)
    ]
    with open_run(config, run_path, display, splits, policies) as run:
        for t in range(1, settings.iterations + 1):
            seed = derive_seed(config.seed, "sample", t)
            before, after = dict.fromkeys(NAMES, t - 1), dict.fromkeys(NAMES, t)
            sampling = Sampling.of(config.rollout, seed)
            run.sample(t, Duet(), before, Ranked(), samples=config.rollout.samples, sampling=sampling)
            for name in NAMES:
                run.train(t, name, WeightedNll(), seed=derive_seed(config.seed, name, t))
            run.evaluate(t, Duet(), after, answers="answerer")

            def score() -> Json:
                """The verb, on a policy that was just pushed."""
                spans = [ScoreRequest.of(range(2, 12), 4), ScoreRequest.of(range(20, 40), 1)]
                return {
                    name: [float(x.sum()) for x in run.cluster.policy(name).score(spans)] for name in NAMES
                }

            run.once(f"{t}/scores", score)
        return step_outcome(run.report(settings), ())
