"""What finished runs found out, question by question. Read from their files alone, so at any time again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.core.comparison import check_comparable
from pipeline.core.errors import UserError
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import Arm, Experiment, Metric
from pipeline.core.question_scores import Scores as ByQuestion
from pipeline.core.question_scores import read_scores
from pipeline.core.report import EVALUATION
from pipeline.core.run import Json
from pipeline.core.status import seconds_of

Scores = Mapping[str, float]
"""A score in [0, 1] by question id."""
Table = npt.NDArray[np.float64]
"""[S seeds, Q questions] of scores, or of their differences."""


@dataclass(frozen=True, slots=True)
class Point:
    """A run after an iteration: dev scores, and the tokens generated for training and the seconds up to there."""

    iteration: int
    dev: Scores
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run. `told` is the test as the run has recorded it; `points` are the iterations from 0 on, none where an arm
    looks at another's runs."""

    seed: int
    test: Scores
    told: Json
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
    """All that is finished of an experiment; `missing` names the runs that are not."""

    experiment: Experiment
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]

    @property
    def baseline(self) -> ArmResult | None:
        """None while no run of it is finished."""
        return next((found for found in self.arms if found.arm == self.experiment.baseline), None)


def common_scores(runs: Sequence[Scores]) -> tuple[list[str], Table]:
    """The ids that all runs have, in the order of the first, and the table of their scores."""
    ids = [id_ for id_ in runs[0] if all(id_ in run for run in runs[1:])]
    return ids, np.array([[run[id_] for id_ in ids] for run in runs], dtype=np.float64)


def differences(found: ArmResult, baseline: ArmResult) -> tuple[list[str], Table]:
    """Scores of an arm minus the baseline's, seed by seed and question by question, of what both have."""
    theirs = {run.seed: run.test for run in baseline.runs}
    pairs = [(run.test, theirs[run.seed]) for run in found.runs if run.seed in theirs]
    if not pairs:
        return [], np.empty((0, 0))
    ids, scores = common_scores([scores for pair in pairs for scores in pair])
    return ids, scores[0::2] - scores[1::2]


def read_results(experiment: Experiment, runs: Sequence[PlannedRun]) -> Results:
    """
    Raises:
        UserError: a run's files are damaged or of an earlier version, or runs do not answer the same questions, or are
            not scored by the same protocol.
    """
    finished = [run for run in runs if run.is_finished()]
    reader = _Reader(experiment.spec.metric)
    arms = []
    for arm in experiment.arms:
        own = [run for run in finished if run.arm.name == arm.of]
        if own:
            arms.append(reader.arm(own, arm))
    return Results(experiment, tuple(arms), tuple(run.title for run in runs if run not in finished))


class _Reader:
    """Reads runs, and sees to it that what is compared can be: in all of them the same rules and, under an id, the same
    question."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._known: dict[str, list[tuple[ByQuestion, Path]]] = {}
        """By split an evaluation of each set of questions."""

    def arm(self, runs: Sequence[PlannedRun], arm: Arm) -> ArmResult:
        results = []
        questions: dict[str, Asked] = {}
        for run in runs:
            told = run.files.finished(f"test/{arm.test}")
            if told is None:
                raise UserError(
                    f"{run.path} has no test/{arm.test}.json, and the run is finished; see why, or remove the run"
                )
            test = self._read(run.files.at(f"test/{arm.test}.parquet"), "test")
            questions |= {
                id_: Asked(hops, type_)
                for id_, hops, type_ in zip(test.ids, test.hops, test.types, strict=True)
            }
            points = tuple(self._points(run)) if arm.has_runs else ()
            results.append(RunResult(run.seed, self._scores(test), told, points))
        return ArmResult(arm, tuple(results), questions)

    def _points(self, run: PlannedRun) -> list[Point]:
        points, tokens, seconds = list[Point](), 0, 0.0
        for t in range(run.config.of_recipe.iterations + 1):
            steps = run.files.steps(t)
            tokens += steps.get("sample", {}).get("generated_tokens", 0)
            seconds += seconds_of(steps.values())
            if EVALUATION in steps:
                dev = self._scores(self._read(run.files.at(f"{t}/{EVALUATION}.parquet"), "dev"))
                points.append(Point(t, dev, tokens, seconds))
        return points

    def _scores(self, found: ByQuestion) -> Scores:
        return dict(zip(found.ids, found.values[self._metric].tolist(), strict=True))

    def _read(self, path: Path, split: str) -> ByQuestion:
        found = read_scores(path)
        if found is None:
            what = "was written by an earlier version" if path.is_file() else "is not there"
            raise UserError(
                f"{path} {what}, so its run has no scores by question; remove the run, and it is made anew"
            )
        known = self._known.setdefault(split, [])
        for other, its_path in known:
            check_comparable(other, found, (str(its_path), str(path)))
        if all(other.asked != found.asked for other, _ in known):
            known.append((found, path))
        return found
