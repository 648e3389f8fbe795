"""Other weights of the same samples: what is beside the trajectories of an E-step is enough for every method.

Two methods that are compared by two runs differ also by what was sampled; computed of the same trajectories they differ
by themselves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.core.agents.program import Sampling
from pipeline.core.config import Config, WeightingConfig
from pipeline.core.errors import UserError
from pipeline.core.rewards import is_own
from pipeline.core.run import Json, RunFiles
from pipeline.core.shards import side_cars, statistics_by_task
from pipeline.core.weighing import Facts, logs_from_json, scored_from_json, weights_of
from pipeline.core.weighting import Scored, bound_of, summarise


@dataclass(frozen=True, slots=True)
class Stored:
    """A question's trajectories that were scored in an E-step, and log w as they were trained with; None: with none."""

    id: str
    scored: Sequence[Scored]
    facts: Sequence[Facts]
    log_weights: Sequence[float] | None


def read_stored(run: RunFiles, t: int) -> list[Stored]:
    """Of every question of the E-step of iteration t that has a scored trajectory, in the order of the questions.

    Raises:
        UserError: there is no such E-step, or it was written by an earlier version, or by another recipe.
    """
    rollouts = run.at(f"{t}/rollouts")
    if run.finished(f"{t}/sample") is None:
        raise UserError(
            f"{run.path} has no finished E-step of iteration {t} (no iterations/{t:04d}/sample.json)"
        )
    found = []
    for id_, row in statistics_by_task(rollouts).items():
        if "facts" not in row or len(row["facts"]) != len(row["scored"]):
            raise UserError(
                f"{rollouts} does not say what other weights need of each trajectory: it was written by an earlier "
                "version, or by another recipe than exsearch"
            )
        logs = None if row["log_weights"] is None else logs_from_json(row["log_weights"])
        if row["scored"]:
            scored = [scored_from_json(one) for one in row["scored"]]
            found.append(Stored(id_, scored, [Facts(**one) for one in row["facts"]], logs))
    if not found:
        raise UserError(f"{rollouts} has no trajectory that was scored")
    return found


def reweigh(stored: Stored, weighting: WeightingConfig, *, from_the_model: bool) -> list[float] | None:
    """log w of a question's trajectories by another method; None where they have none (`weights_of`).

    Args:
        from_the_model: the trajectories were sampled from the model itself, so that every ratio p / q is 1.

    Raises:
        UserError: the weights need log q, which was not recorded.
    """
    return weights_of(scored_under(stored, weighting, from_the_model=from_the_model), weighting)


def scored_under(stored: Stored, weighting: WeightingConfig, *, from_the_model: bool) -> list[Scored]:
    """What `log_weights` takes, by the metric and the ratio that another method looks at; raises as `reweigh`."""
    return [
        replace(
            scored,
            # One of the user's own is the run's: no other is known of its trajectories.
            reward=scored.reward if is_own(weighting.reward) else getattr(facts, weighting.reward),
            log_ratio=_log_ratio(facts, weighting, from_the_model) if weighting.correct_proposal else 0.0,
        )
        for scored, facts in zip(stored.scored, stored.facts, strict=True)
    ]


def _log_ratio(facts: Facts, weighting: WeightingConfig, from_the_model: bool) -> float:
    found = facts.log_ratio_with_answer if weighting.method == "reward" else facts.log_ratio
    if found is not None:
        return found
    if from_the_model:
        return 0.0
    raise UserError(
        "weighting.correct_proposal needs the log-probabilities under the distribution that was sampled from, and this "
        "run did not record them: it was made without weighting.correct_proposal"
    )


def figures_of(questions: Sequence[Stored], weighting: WeightingConfig, *, from_the_model: bool) -> Json:
    """What `sample.json` would say of these weights, and on what they lie; raises as `reweigh`.

    Weights are those of whole trajectories: with `credit: turn` they are those of the answer.

    Returns:
        the fields of `WeightingSummary`, and `right_share`: of the sum of all weights the percentage on trajectories
        whose own answer is right, None where all weights are zero.
    """
    scored = [scored_under(one, weighting, from_the_model=from_the_model) for one in questions]
    if weighting.subtract_baseline and not any(s.before for group in scored for s in group):
        raise UserError(
            "weighting.subtract_baseline needs the likelihood of the answers in front of the first turn, and this run "
            "did not score it: it was made without weighting.subtract_baseline and without weighting.credit: turn"
        )
    logs = [weights_of(group, weighting) for group in scored]
    if all(own is None for own in logs):
        raise UserError(
            f"no question has two trajectories that weighting.method: {weighting.method} could compare"
        )
    summary = summarise(scored, [None if own is None else np.array(own) for own in logs], weighting)
    weighted = [(own, group) for own, group in zip(logs, scored, strict=True) if own is not None]
    pairs = [(log, s.correct) for own, group in weighted for log, s in zip(own, group, strict=True)]
    every, right = (np.array(column) for column in zip(*pairs, strict=True))
    weights = np.exp(every - every.max()) if np.isfinite(every.max()) else np.zeros(len(every))
    share = 100.0 * float(weights[right].sum() / weights.sum()) if weights.any() else None
    return {**asdict(summary), "right_share": share}


def is_from_the_model(config: Config) -> bool:
    """Whether the trajectories of a run's E-steps are samples of the model itself."""
    return Sampling.of(config.rollout, 0).is_from_the_model


def bounds_of(run: RunFiles, step: str, folder: str, weighting: WeightingConfig) -> Mapping[str, float]:
    """The likelihood bound of each question in a step that sampled ("1/sample"), by its id; empty where it is not
    finished. `folder` has its trajectories ("1/rollouts").
    """
    if run.finished(step) is None:
        return {}
    rollouts = run.at(folder)
    stamp = tuple((path.name, path.stat().st_mtime_ns) for path in side_cars(rollouts))
    return _bounds(rollouts, stamp, weighting)


@lru_cache(maxsize=64)
def _bounds(
    rollouts: Path, stamp: tuple[tuple[str, int], ...], weighting: WeightingConfig
) -> Mapping[str, float]:
    """Once as long as the side-cars stay as they are (`stamp`): a report is made again after every step."""
    return {
        id_: bound_of([scored_from_json(one) for one in row["scored"]], weighting)
        for id_, row in statistics_by_task(rollouts).items()
        if row.get("scored")
    }


def as_json(
    questions: Sequence[Stored], weights: Mapping[str, Sequence[Sequence[float] | None]]
) -> list[Json]:
    """By question everything that its weights are made of, and these by method; lists run over the trajectories."""
    rows: list[Json] = []
    for number, one in enumerate(questions):
        columns = {field.name: [getattr(f, field.name) for f in one.facts] for field in fields(Facts)}
        rows.append(
            {
                "id": one.id,
                **columns,
                "log_likelihood": [s.log_likelihood for s in one.scored],
                "log_weights": {
                    "stored": one.log_weights,
                    **{name: w[number] for name, w in weights.items()},
                },
            }
        )
    return rows
