"""What finished runs found out, question by question. Read from their files alone, so at any time again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.data.splits import Splits, load_splits
from pipeline.core.errors import UserError
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import Arm, Experiment, Metric
from pipeline.core.records import Question
from pipeline.core.report import EVALUATION
from pipeline.core.run import Json
from pipeline.core.scoring.answers import ProtocolName, score_answer
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
class ArmResult:
    """The finished runs of an arm, at least one, in the order of their seeds.

    Attributes:
        questions: the test questions by id.
    """

    arm: Arm
    runs: tuple[RunResult, ...]
    questions: Mapping[str, Question]

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
        UserError: a run's files are damaged, or its questions are not those of the data now.
    """
    finished = [run for run in runs if run.is_finished()]
    reader = _Reader(experiment.spec.metric)
    arms = []
    for arm in experiment.arms:
        own = [run for run in finished if run.arm.name == arm.of]
        if own:
            results = tuple(reader.run(run, arm) for run in own)
            questions = {q.id: q for run in own for q in reader.splits(run).test}
            arms.append(ArmResult(arm, results, questions))
    return Results(experiment, tuple(arms), tuple(run.title for run in runs if run not in finished))


class _Reader:
    """Reads runs, and the questions of each configuration of the data once."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._splits: dict[tuple[str, int], Splits] = {}

    def splits(self, run: PlannedRun) -> Splits:
        key = (run.config.data.model_dump_json(), run.config.seed)
        if key not in self._splits:
            self._splits[key] = load_splits(run.config.data, run.config.seed)
        return self._splits[key]

    def run(self, run: PlannedRun, arm: Arm) -> RunResult:
        step = f"test/{arm.test}"
        told = run.files.finished(step)
        if told is None:
            raise UserError(
                f"{run.path} has no {step}.json, and the run is finished; see why, or remove the run"
            )
        test = self._scores(run, step, self.splits(run).test, told)
        return RunResult(run.seed, test, told, tuple(self._points(run)) if arm.has_runs else ())

    def _points(self, run: PlannedRun) -> list[Point]:
        points, tokens, seconds = list[Point](), 0, 0.0
        for t in range(run.config.of_recipe.iterations + 1):
            steps = run.files.steps(t)
            tokens += steps.get("sample", {}).get("generated_tokens", 0)
            seconds += seconds_of(steps.values())
            if (told := steps.get(EVALUATION)) is not None:
                dev = self._scores(run, f"{t}/{EVALUATION}", self.splits(run).dev, told["scores"])
                points.append(Point(t, dev, tokens, seconds))
        return points

    def _scores(self, run: PlannedRun, step: str, questions: Sequence[Question], told: Json) -> Scores:
        path = run.files.at(f"{step}.parquet")
        scores = _question_scores(path, questions, self._metric, run.config.evaluation.protocol)
        mean = 100 * float(np.mean(list(scores.values())))
        if told["n"] != len(questions) or abs(mean - told[self._metric]) > 1e-6:
            raise UserError(
                f"{path}: {self._metric} is {mean:.2f} by the {len(questions)} questions that there are now, and was "
                f"{told[self._metric]:.2f} of {told['n']} in the run: the data have changed since. Put them back, or "
                "choose another folder for the runs"
            )
        return scores


def _question_scores(
    path: Path, questions: Sequence[Question], metric: Metric, protocol: ProtocolName
) -> Scores:
    """Of all questions; one without a trajectory, or whose trajectory failed, scores 0."""
    try:
        table = pq.read_table(path, columns=["question_id", "answer"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error!s:.200}); copy it back, or run anew") from error
    answers = dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    return {
        q.id: getattr(score_answer(answers[q.id], q.answers, protocol), metric) if q.id in answers else 0.0
        for q in questions
    }
