"""A line per question of a part of a source, for the table: figures of its trajectories, without their tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.records import Question
from pipeline.core.run import Json, read_json
from pipeline.core.scoring.answers import score_answer
from pipeline.view.questions import Asked
from pipeline.view.sources import Part, Source

LONGEST_ANSWER = 120
"""Characters of an answer that the table shows."""
_COLUMNS = ("question_id", "sample", "role", "stop_reason", "answer", "question", "gold_answers", "hops", "type",
            "steps.list.element.action", "steps.list.element.hits.list.element.id")  # fmt: skip
_NESTED = {"steps.list.element.action", "steps.list.element.hits.list.element.id"}


def rows_of(source: Source, part: Part, asked: Asked) -> Json:
    """Columns by name, all as long as the part has questions; docs/viewer.md has what each means.

    Raises:
        OSError, ArrowInvalid, UserError: a file is damaged, or not there any more.
    """
    file = pq.ParquetFile(part.path)
    wanted = [name for name in _COLUMNS if name in file.schema_arrow.names or name in _NESTED]
    tasks, questions = tasks_of(part), asked.of(source.split)
    groups = itertools.groupby(file.read(columns=wanted).to_pylist(), key=lambda row: row["question_id"])
    lines = [
        _line(rows, tasks.get(id_), question_of(id_, rows, questions), asked)
        for id_, rows in ((id_, list(own)) for id_, own in groups)
    ]
    names = lines[0] if lines else ()
    return {name: [line[name] for line in lines] for name in names}


def tasks_of(part: Part) -> dict[str, Json]:
    """By question what the side-car says; empty without one.

    Raises:
        UserError: it is damaged.
    """
    side_car = None if part.side_car is None else read_json(part.side_car)
    return {task["id"]: task for task in (side_car or {}).get("tasks", [])}


def question_of(id_: str, rows: Sequence[Mapping[str, Any]], questions: Mapping[str, Question]) -> Question:
    """As its file has it; else as the table of an evaluation does; else its id alone."""
    if id_ in questions:
        return questions[id_]
    row = rows[0]
    return Question(
        id=id_,
        text=row.get("question") or "",
        answers=tuple(row.get("gold_answers") or ()),
        type=row.get("type") or "",
        hops=row.get("hops"),
    )


def _line(rows: Sequence[Mapping[str, Any]], task: Json | None, question: Question, asked: Asked) -> Json:
    last_turns = list({row["sample"]: row for row in rows}.values())
    scores = [score_answer(row["answer"], question.answers, asked.protocol) for row in last_turns]
    gold = set(question.supporting_ids)
    found = [{hit["id"] for step in row["steps"] for hit in step["hits"]} for row in last_turns]
    weights = _weights((task or {}).get("statistics", {}))
    return {
        "id": question.id,
        "question": question.text,
        "gold_answer": question.answers[0] if question.answers else "",
        "answer": last_turns[0]["answer"][:LONGEST_ANSWER],
        "hops": question.hops,
        "type": question.type,
        "gold_passages": len(gold) or None,
        "trajectories": len(last_turns),
        "em": _mean([score.em for score in scores]) if question.answers else None,
        "f1": _mean([score.f1 for score in scores]) if question.answers else None,
        "searches": _mean([sum(not step["action"] for step in row["steps"]) for row in last_turns]),
        "gold_recall": _mean([len(own & gold) / len(gold) for own in found]) if gold else None,
        "stops": dict(Counter(row["stop_reason"] for row in last_turns)),
        "generated_tokens": (task or {}).get("generated_tokens"),
        **weights,
    }


def _weights(statistics: Mapping[str, Any]) -> Json:
    """Log of the mean likelihood of the gold answers, and the effective number of samples; null without weights."""
    scored, log_weights = statistics.get("scored") or [], statistics.get("log_weights") or []
    likelihoods = [_exp(one.get("log_likelihood")) for one in scored]
    weights = [_exp(one) for one in log_weights]
    squares = sum(weight**2 for weight in weights)
    mean = _mean(likelihoods)
    return {
        "log_likelihood": math.log(mean) if mean else None,
        "effective_samples": sum(weights) ** 2 / squares if squares else None,
    }


def _exp(value: float | None) -> float:
    """Of a logarithm as files have it: null is that of zero."""
    return 0.0 if value is None else math.exp(min(value, 700.0))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
