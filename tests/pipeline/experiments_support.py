"""Finished runs of experiments, as real ones leave them behind, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pipeline.core.data.splits import load_splits
from pipeline.core.evaluation import evaluate
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.question_scores import scored_table
from pipeline.core.records import Question, StopReason, Trajectory
from pipeline.core.report import best_iteration
from pipeline.core.run import Json, RunDirectory, write_table

IsRight = Callable[[str, int], bool]
"""Whether the question of this place is answered rightly in a step ("1/evaluation", "test/best")."""
TOKENS, SECONDS = 1_000, 10.0
"""Of each iteration."""


def trajectory(question: Question, answer: str) -> Trajectory:
    ids, mask, logprobs = np.array([1], np.int32), np.array([True]), np.array([-0.5], np.float32)
    return Trajectory(question.id, 0, 0, ids, mask, logprobs, 1, (), answer, StopReason.ANSWERED)


def finish(run: PlannedRun, is_right: IsRight) -> None:
    """Everything that `exsearch train` writes and results are read from."""
    config = run.config
    splits, settings = load_splits(config.data, config.seed), config.of_recipe
    with RunDirectory(run.path, config) as files:
        for t in range(settings.iterations + 1):
            if t:
                files.record(
                    f"{t}/sample", {"generated_tokens": TOKENS, "seconds_waited": SECONDS - 2}, SECONDS
                )
            files.record(f"{t}/searcher/train", {"loss": 0.1}, 2.0)
            scores = _answered(files, f"{t}/evaluation", splits.dev, is_right)
            files.record(f"{t}/evaluation", {"push": {}, "scores": scores}, 0.0)
            if t:
                files.close_iteration(t)
        best = best_iteration(files, settings)
        for name in ("base", "cold_start", "best"):
            scores = _answered(files, f"test/{name}", splits.test, is_right)
            files.once(f"test/{name}", partial(dict, {"iteration": best, **scores}))


def _answered(files: RunDirectory, step: str, questions: Sequence[Question], is_right: IsRight) -> Json:
    given = [
        trajectory(question, question.answers[0] if is_right(step, place) else "something else")
        for place, question in enumerate(questions)
    ]
    write_table(files.at(f"{step}.parquet"), scored_table(questions, given, "exsearch"))
    return evaluate(questions, given, bootstrap_samples=10)
