"""What finished runs found out, question by question. Read from their files alone, or from numbers that were kept, so
at any time again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.comparison import check_comparable
from pipeline.core.errors import UserError
from pipeline.core.experiments.numbers import Developed, RunNumbers, Tested, read_run, settings_of
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import Arm, Experiment, Metric
from pipeline.core.scoring.comparisons import Scores, Table, common_scores


@dataclass(frozen=True, slots=True)
class Point:
    """A run after an iteration: dev scores, and the tokens generated for training and the seconds up to there."""

    iteration: int
    dev: Scores
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run. `told` is what it recorded of the test beside scores; `points` are the iterations from 0 on, none where
    an arm looks at another's runs."""

    seed: int
    test: Scores
    told: Mapping[str, float | None]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What tables group test questions by."""

    hops: int | None
    type: str


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The finished runs of an arm, at least one, in the order of their seeds.

    Attributes:
        questions: the test questions by id.
    """

    arm: Arm
    runs: tuple[RunResult, ...]
    questions: Mapping[str, Asked]

    def tests(self) -> tuple[list[str], Table]:
        """The test questions that all runs answered, and their scores."""
        return common_scores([run.test for run in self.runs])

    def dev(self, iteration: int) -> Table | None:
        """Dev scores after an iteration, of the runs that came so far; None if none did."""
        points = [p for run in self.runs for p in run.points if p.iteration == iteration]
        return common_scores([point.dev for point in points])[1] if points else None

    @property
    def last_iteration(self) -> int:
        """-1 where an arm looks at another's runs."""
        return max((point.iteration for run in self.runs for point in run.points), default=-1)


@dataclass(frozen=True, slots=True)
class Results:
    """All that is finished of an experiment; `missing` names the runs that are not, `numbers` has those that are, each
    with its arm's name."""

    experiment: Experiment
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]
    numbers: tuple[tuple[str, RunNumbers], ...]

    @property
    def baseline(self) -> ArmResult | None:
        """None while no run of it is finished."""
        return next((found for found in self.arms if found.arm == self.experiment.baseline), None)


def differences(found: ArmResult, baseline: ArmResult) -> tuple[list[str], Table]:
    """Scores of an arm minus the baseline's, seed by seed and question by question, of what both have."""
    theirs = {run.seed: run.test for run in baseline.runs}
    pairs = [(run.test, theirs[run.seed]) for run in found.runs if run.seed in theirs]
    if not pairs:
        return [], np.empty((0, 0))
    ids, scores = common_scores([scores for pair in pairs for scores in pair])
    return ids, scores[0::2] - scores[1::2]


def read_results(
    experiment: Experiment, runs: Sequence[PlannedRun], kept: Mapping[str, RunNumbers] | None = None
) -> Results:
    """
    Args:
        kept: numbers of runs that need not be there, by their settings. A run that is there counts for itself.

    Raises:
        UserError: a run's files are damaged or of an earlier version, or runs do not answer the same questions, or are
            not scored by the same protocol.
    """
    known = kept or {}
    every = [(run, read_run(run) if run.is_finished() else known.get(settings_of(run))) for run in runs]
    read = [(run, found) for run, found in every if found is not None]
    reader = _Reader(experiment.spec.metric)
    arms = []
    for arm in experiment.arms:
        if own := [numbers for run, numbers in read if run.arm.name == arm.of]:
            arms.append(reader.arm(own, arm))
    numbers = tuple((run.arm.name, found) for run, found in read)
    missing = tuple(run.title for run, found in every if found is None)
    return Results(experiment, tuple(arms), missing, numbers)


class _Reader:
    """Takes what is shown from the numbers of runs, and sees to it that what is compared can be: in all of them the
    same rules and, under an id, the same question."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._known: dict[str, list[Tested | Developed]] = {"test": [], "dev": []}
        """By split an evaluation of each set of questions."""

    def arm(self, runs: Sequence[RunNumbers], arm: Arm) -> ArmResult:
        results = []
        questions: dict[str, Asked] = {}
        for run in runs:
            if (test := run.tests.get(arm.test)) is None:
                raise UserError(
                    f"{run.where} has no test {arm.test}, and the run is finished; see why, or remove the run"
                )
            found = test.scores
            questions |= {
                id_: Asked(hops, type_)
                for id_, hops, type_ in zip(found.ids, found.hops, found.types, strict=True)
            }
            points = [self._point(point) for point in run.points] if arm.has_runs else []
            results.append(RunResult(run.seed, self._scores(test, "test"), test.told, tuple(points)))
        return ArmResult(arm, tuple(results), questions)

    def _point(self, point: Developed) -> Point:
        return Point(point.iteration, self._scores(point, "dev"), point.tokens, point.seconds)

    def _scores(self, found: Tested | Developed, split: str) -> Scores:
        known = self._known[split]
        for other in known:
            check_comparable(other.scores, found.scores, (other.where, found.where))
        if all(other.scores.asked != found.scores.asked for other in known):
            known.append(found)
        return dict(zip(found.scores.ids, found.scores.values[self._metric].tolist(), strict=True))
