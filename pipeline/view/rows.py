"""A line per question of a part of a source, for the table: figures of its trajectories, without their tokens."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.config import WeightingConfig
from pipeline.core.records import Question, StopReason
from pipeline.core.run import Json
from pipeline.core.scoring.answers import score_answer
from pipeline.core.weighing import logs_from_json, scored_from_json
from pipeline.core.weighting import bound_of, effective_sample_size
from pipeline.view.questions import Asked, question_of
from pipeline.view.sources import Part, Source, reading, statistics_in

LONGEST_ANSWER, LONGEST_QUESTION = 120, 400
"""Characters that the table shows."""
_COLUMNS = ("question_id", "sample", "stop_reason", "answer", "question", "gold_answers", "hops", "type")
_OF_STEPS = ("steps.list.element.action", "steps.list.element.hits.list.element.id")
_FAILURES = {reason.value for reason in StopReason if reason.is_infrastructure}
Row = Mapping[str, Any]


def rows_of(source: Source, part: Part, asked: Asked) -> Json:
    """Columns by name, with an element per question; docs/viewer.md has what each means. Of a part without questions
    there are none.

    Raises:
        NoSuchPage, UserError: a file is not there any more, or damaged.
    """
    stored = part.schema()
    with reading(part.path):
        columns = [*(name for name in _COLUMNS if name in stored), *_OF_STEPS]
        rows = pq.ParquetFile(part.path).read(columns=columns).to_pylist()
    tasks, questions = part.tasks(), asked.of(source.split)
    about = _About(
        asked,
        # Where nothing was answered in all of the part nobody was asked to: other recipes sample without.
        is_answered=any(row["answer"] for row in rows),
        has_ids=all(hit["id"] for row in rows for step in row["steps"] for hit in step["hits"]),
    )
    lines = []
    for id_, group in itertools.groupby(rows, key=lambda row: row["question_id"]):
        own = list(group)
        line = about.line(question_of(id_, own[0], questions), own)
        task = tasks.get(id_, {})
        with reading(part.side_car or part.path):
            weights = weights_of(statistics_in(tasks, id_), asked.weighting)
        lines.append({**line, "generated_tokens": task.get("generated_tokens"), **weights})
    names = lines[0] if lines else ()
    return {name: [line[name] for line in lines] for name in names}


def ids_of(source: Source, part: Part, asked: Asked) -> Json:
    """`ids` of the questions of a part, in their order, and a checksum of each one's words, by which the same question
    is told from another one of that id; null where they are not known.

    Raises:
        NoSuchPage, UserError: a file is not there any more, or damaged.
    """
    words = {}
    if "question" in part.schema():
        with reading(part.path):
            table = pq.read_table(part.path, columns=["question_id", "question"]).to_pydict()
        words = dict(zip(table["question_id"], table["question"], strict=True))
    questions, ids = asked.of(source.split), [id_ for id_, _ in part.questions()]
    texts = [questions[id_].text if id_ in questions else words.get(id_) for id_ in ids]
    return {"ids": ids, "words": [text and zlib.crc32(text.encode()) for text in texts]}


class _About:
    """What holds for all questions of a part."""

    def __init__(self, asked: Asked, *, is_answered: bool, has_ids: bool) -> None:
        self._protocol, self._is_answered, self._has_ids = asked.protocol, is_answered, has_ids

    def line(self, question: Question, rows: Sequence[Row]) -> Json:
        """Of a question's episodes: each may have a turn of several roles, and the last one answers."""
        samples = [list(own) for _, own in itertools.groupby(rows, key=lambda row: row["sample"])]
        scores = [score_answer(own[-1]["answer"], question.answers, self._protocol) for own in samples]
        steps = [[step for row in own for step in row["steps"]] for own in samples]
        gold = set(question.supporting_ids) if self._has_ids else set()
        found = [{hit["id"] for step in own for hit in step["hits"]} for own in steps]
        is_scored = bool(question.answers) and self._is_answered
        return {
            "id": question.id,
            "question": question.text[:LONGEST_QUESTION],
            "gold_answer": question.answers[0][:LONGEST_ANSWER] if question.answers else "",
            "answer": samples[0][-1]["answer"][:LONGEST_ANSWER],
            "hops": question.hops,
            "type": question.type,
            "gold_passages": len(gold) or None,
            "trajectories": len(samples),
            "em": _mean([score.em for score in scores]) if is_scored else None,
            "f1": _mean([score.f1 for score in scores]) if is_scored else None,
            "searches": _mean([sum(bool(step["hits"]) for step in own) for own in steps]),
            "gold_recall": _mean([len(own & gold) / len(gold) for own in found]) if gold else None,
            "stops": dict(Counter(_stop_reason(own) for own in samples)),
        }


def weights_of(statistics: Mapping[str, Any], config: WeightingConfig) -> Json:
    """log (1/K) sum_k r_k p(y | x, z_k), and the effective number of samples; null where nothing was scored."""
    scored, log_weights = statistics.get("scored"), statistics.get("log_weights")
    return {
        "log_likelihood": bound_of([scored_from_json(one) for one in scored], config) if scored else None,
        "effective_samples": effective_sample_size(np.array(logs_from_json(log_weights)))
        if log_weights
        else None,
    }


def _stop_reason(turns: Sequence[Row]) -> str:
    """As reports count it: what failed for the whole episode, else how its first turn ended."""
    reasons: list[str] = [turn["stop_reason"] for turn in turns]
    return next((reason for reason in reasons if reason in _FAILURES), reasons[0])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
