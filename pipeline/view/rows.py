"""A line per question of a part of a source, for the table: figures of its trajectories, without their tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_lists import elements_of, lengths_of
from pipeline.core.config import WeightingConfig
from pipeline.core.records import Question, StopReason
from pipeline.core.run import Json
from pipeline.core.scoring.answers import score_answer
from pipeline.core.weighing import logs_from_json, scored_from_json
from pipeline.core.weighting import bound_of, effective_sample_size
from pipeline.view.questions import Asked, question_of
from pipeline.view.sources import Part, Source, statistics_in
from pipeline.view.stored import NoSuchPage, footer, read_rows, reading

PER_PAGE = 1024
"""Questions whose lines are on a page together."""
LONGEST_ANSWER, LONGEST_QUESTION = 120, 400
"""Characters that the table shows."""
_COLUMNS = ("sample", "stop_reason", "answer", "question", "gold_answers", "hops", "type")
_HIT_IDS = "steps.list.element.hits.list.element.id"
_FAILURES = {reason.value for reason in StopReason if reason.is_infrastructure}
Row = Mapping[str, Any]


def rows_of(source: Source, part: Part, page: int, asked: Asked) -> Json:
    """Of the questions `page * PER_PAGE` to the next: columns by name, with an element per question; docs/viewer.md has
    what each means. Of a part without questions there are none. `pages`: how many the part has.

    Raises:
        NoSuchPage, UserError: there is no such page, or a file is not there any more, or damaged.
    """
    every, known = part.questions(), footer(part.path)
    pages = max(1, math.ceil(len(every) / PER_PAGE))
    start, end = page * PER_PAGE, min((page + 1) * PER_PAGE, len(every))
    if page >= pages:
        raise NoSuchPage(f"{source.key}/{part.name} has no page {page} of lines")
    if start == end:
        return {"pages": pages, "columns": {}}
    starts = every.starts[start : end + 1]
    columns = [*(name for name in _COLUMNS if name in known.columns), _HIT_IDS]
    table = read_rows(part.path, int(starts[0]), int(starts[-1]), columns)
    with reading(part.path):
        answers, ids = known.bounds("answer"), known.bounds(_HIT_IDS)
        found = _hit_ids(table.column("steps"))
        rows = [
            {**row, "hits": hits}
            for row, hits in zip(table.drop_columns("steps").to_pylist(), found, strict=True)
        ]
    about = _About(
        asked,
        # Where nothing was answered in all of the part nobody was asked to: other recipes sample without.
        is_answered=answers is None or bool(answers[1]),
        has_ids=ids is None or bool(ids[0]),
    )
    tasks, questions = part.tasks(), asked.of(source.split)
    lines = []
    borders = itertools.pairwise((starts - starts[0]).tolist())
    for id_, (first, last) in zip(every.ids[start:end].to_pylist(), borders, strict=True):
        line = about.line(question_of(id_, rows[first], questions), rows[first:last])
        with reading(part.side_car or part.path):
            weights = weights_of(statistics_in(tasks, id_), asked.weighting)
        lines.append({**line, "generated_tokens": tasks.get(id_, {}).get("generated_tokens"), **weights})
    return {"pages": pages, "columns": {name: [line[name] for line in lines] for name in lines[0]}}


def _hit_ids(steps: pa.ChunkedArray) -> list[list[list[str]]]:
    """Of each row, of each of its steps, the ids of what was found."""
    of_rows = steps.combine_chunks()
    of_steps = elements_of(of_rows).field("hits")
    ids = iter(elements_of(of_steps).field("id").to_pylist())
    found = iter([list(itertools.islice(ids, count)) for count in lengths_of(of_steps).tolist()])
    return [list(itertools.islice(found, count)) for count in lengths_of(of_rows).tolist()]


class _About:
    """What holds for all questions of a part."""

    def __init__(self, asked: Asked, *, is_answered: bool, has_ids: bool) -> None:
        self._protocol, self._is_answered, self._has_ids = asked.protocol, is_answered, has_ids

    def line(self, question: Question, rows: Sequence[Row]) -> Json:
        """Of a question's episodes: each may have a turn of several roles, and the last one answers."""
        samples = [list(own) for _, own in itertools.groupby(rows, key=lambda row: row["sample"])]
        answers = [own[-1]["answer"] for own in samples]
        known = {answer: score_answer(answer, question.answers, self._protocol) for answer in set(answers)}
        scores = [known[answer] for answer in answers]
        steps = [[hits for row in own for hits in row["hits"]] for own in samples]
        gold = set(question.supporting_ids) if self._has_ids else set()
        found = [set(itertools.chain.from_iterable(own)) for own in steps]
        is_scored = bool(question.answers) and self._is_answered
        return {
            "id": question.id,
            "question": question.text[:LONGEST_QUESTION],
            "gold_answer": question.answers[0][:LONGEST_ANSWER] if question.answers else "",
            "answer": answers[0][:LONGEST_ANSWER],
            "hops": question.hops,
            "type": question.type,
            "gold_passages": len(gold) or None,
            "trajectories": len(samples),
            "em": _mean([score.em for score in scores]) if is_scored else None,
            "f1": _mean([score.f1 for score in scores]) if is_scored else None,
            "searches": _mean([sum(map(bool, own)) for own in steps]),
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
