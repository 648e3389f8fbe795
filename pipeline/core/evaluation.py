"""Scores of a whole evaluation: one trajectory per question.

Guarantee: every question counts, also one that failed, has no trajectory or was excluded; its score is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.core.records import Question, StopReason, Trajectory
from pipeline.core.scoring.answers import METRICS, WRONG, AnswerScore, ProtocolName, score_answer
from pipeline.core.scoring.intervals import Interval, bootstrap, wilson


def recall_by_step(trajectory: Trajectory, supporting_ids: Sequence[str]) -> list[float]:
    """Share of the supporting passages found up to and including each search; [] without searches."""
    wanted, found, recalls = set(supporting_ids), set[str](), []
    for step in trajectory.steps:
        if step.action:
            continue
        found |= wanted & {hit.passage.id for hit in step.hits}
        recalls.append(len(found) / len(wanted))
    return recalls


def gold_first(trajectory: Trajectory, supporting_ids: Sequence[str]) -> list[bool]:
    """Of each selection that had a supporting passage to choose from: whether it named one first."""
    wanted, selections = set(supporting_ids), [step for step in trajectory.steps if step.selected]
    return [
        step.used_hits[0].passage.id in wanted
        for step in selections
        if any(hit.passage.id in wanted for hit in step.hits)
    ]


def evaluate(
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    bootstrap_samples: int = 1000,
    seed: int = 0,
    protocol: ProtocolName = "exsearch",
) -> dict[str, Any]:
    """Evaluation of one (greedy) trajectory per question, ready for JSON.

    Args:
        protocol: by whose rules answers are compared.

    Returns:
        n                     number of questions
        em, f1, accuracy      percent, over all questions
        em_interval, ...      [low, high], 95 %: Wilson's of EM and accuracy, a bootstrap over questions of F1, null if
                              `bootstrap_samples` is 0
        gold_recall           mean percentage of a question's supporting passages found in the whole
                              trajectory, over questions that name them; null if none does, or a passage came
                              without an id (from servers that have none)
        gold_recall_by_step   the same after 1, 2, ... searches
        all_gold              percentage of those questions with every supporting passage found
        searches              mean number of searches per question
        gold_first            percentage of the selections (`agent.select`) with a supporting passage to choose from
                              that name one first; null without such selections
        stop_reasons          number of trajectories per stop reason, and `missing`
        by_hops, by_type      {group: {n, em, f1, accuracy, the three intervals, gold_recall}} over questions with that
                              field

    Raises:
        ValueError: no questions, two trajectories of one question, or a trajectory of an unknown question.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate")
    rows = score_questions(questions, trajectories, protocol)
    with_gold = [row for row in rows if row.recalls is not None]
    stop_reasons = Counter({reason.value: 0 for reason in StopReason} | {"missing": 0})
    stop_reasons.update(row.stop_reason for row in rows)
    return {
        **_with_groups(rows, bootstrap_samples, seed),
        "gold_recall_by_step": _mean_recall_by_step([row.recalls for row in rows if row.recalls is not None]),
        "all_gold": _percent([float(row.final_recall == 1.0) for row in with_gold]),
        "searches": float(np.mean([row.searches for row in rows])),
        "gold_first": _percent([float(is_first) for row in rows for is_first in row.gold_first]),
        "stop_reasons": dict(stop_reasons),
    }


def score_questions(
    questions: Sequence[Question], trajectories: Sequence[Trajectory], protocol: ProtocolName
) -> list[QuestionScore]:
    """What `evaluate` is the mean of: the score of each question, in their order.

    Raises:
        ValueError: two trajectories of one question, or a trajectory of an unknown question.
    """
    by_question = _one_per_question(questions, trajectories)
    has_ids = all(hit.passage.id for t in trajectories for step in t.steps for hit in step.hits)
    return [
        _score_question(
            question,
            by_question.get(question.id),
            question.supporting_ids if has_ids else (),
            protocol,
        )
        for question in questions
    ]


def evaluate_answers(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    bootstrap_samples: int = 1000,
    seed: int = 0,
    protocol: ProtocolName = "exsearch",
) -> dict[str, Any]:
    """As `evaluate`, of answers by question id that came without trajectories: what needs these is left out or null."""
    rows = [
        QuestionScore(
            q, score_answer(answers[q.id], q.answers, protocol) if q.id in answers else WRONG, None, 0, ""
        )
        for q in questions
    ]
    return _with_groups(rows, bootstrap_samples, seed)


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """One question's results. `recalls`, after each search, is None where there are no ids to compare."""

    question: Question
    score: AnswerScore
    recalls: list[float] | None
    searches: int
    stop_reason: str
    gold_first: Sequence[bool] = ()

    @property
    def final_recall(self) -> float:
        return self.recalls[-1] if self.recalls else 0.0


def _one_per_question(
    questions: Sequence[Question], trajectories: Sequence[Trajectory]
) -> dict[str, Trajectory]:
    by_question = {t.question_id: t for t in trajectories}
    if len(by_question) != len(trajectories):
        raise ValueError("an evaluation takes one trajectory per question; some question has several")
    if unknown := by_question.keys() - {q.id for q in questions}:
        raise ValueError(f"trajectories of questions that are not evaluated: {sorted(unknown)[:5]}")
    return by_question


def _score_question(
    question: Question,
    trajectory: Trajectory | None,
    supporting_ids: Sequence[str],
    protocol: ProtocolName,
) -> QuestionScore:
    if trajectory is None:
        nothing: list[float] | None = [] if supporting_ids else None
        return QuestionScore(question, WRONG, nothing, 0, "missing")
    return QuestionScore(
        question=question,
        score=score_answer(trajectory.answer, question.answers, protocol),
        recalls=recall_by_step(trajectory, supporting_ids) if supporting_ids else None,
        searches=trajectory.num_searches,
        stop_reason=trajectory.stop_reason.value,
        gold_first=gold_first(trajectory, supporting_ids),
    )


def _with_groups(rows: Sequence[QuestionScore], bootstrap_samples: int, seed: int) -> dict[str, Any]:
    summarise = partial(_summary, bootstrap_samples=bootstrap_samples, seed=seed)
    return {
        **summarise(rows),
        "by_hops": {hops: summarise(group) for hops, group in _groups(rows, _hops).items()},
        "by_type": {type_: summarise(group) for type_, group in _groups(rows, _type).items()},
    }


def _summary(rows: Sequence[QuestionScore], bootstrap_samples: int, seed: int) -> dict[str, Any]:
    f1 = [row.score.f1 for row in rows]
    return {
        "n": len(rows),
        **{name: _percent([getattr(row.score, name) for row in rows]) for name in METRICS},
        "em_interval": _in_percent(wilson(sum(row.score.em == 1.0 for row in rows), len(rows))),
        "f1_interval": _in_percent(bootstrap(f1, bootstrap_samples, seed)) if bootstrap_samples else None,
        "accuracy_interval": _in_percent(wilson(sum(row.score.accuracy == 1.0 for row in rows), len(rows))),
        "gold_recall": _percent([row.final_recall for row in rows if row.recalls is not None]),
    }


def _hops(row: QuestionScore) -> str:
    return "" if row.question.hops is None else str(row.question.hops)


def _type(row: QuestionScore) -> str:
    return row.question.type


def _groups(
    rows: Sequence[QuestionScore], label: Callable[[QuestionScore], str]
) -> dict[str, list[QuestionScore]]:
    """The rows by their label, in the order of the labels; those without one are left out."""
    groups: dict[str, list[QuestionScore]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return {name: groups[name] for name in sorted(groups) if name}


def _percent(values: Sequence[float]) -> float | None:
    return 100.0 * float(np.mean(values)) if values else None


def _in_percent(interval: Interval) -> list[float]:
    return [100.0 * bound for bound in interval]


def _mean_recall_by_step(recalls: Sequence[list[float]]) -> list[float]:
    """Mean percentage after each search; a trajectory that stopped earlier keeps what it had found."""
    steps = max((len(r) for r in recalls), default=0)
    padded = [r + [r[-1] if r else 0.0] * (steps - len(r)) for r in recalls]
    return [100.0 * float(np.mean([r[step] for r in padded])) for step in range(steps)]
