"""The trajectories of some questions as text: turn by turn, what was written, found, trained and weighed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.record_tables import (
    EXAMPLE_SCHEMA,
    TRAJECTORY_SCHEMA,
    examples_from_table,
    trajectories_from_table,
)
from pipeline.core.records import Example, Question, Step, StopReason, Trajectory, step_as_json
from pipeline.core.run import Json
from pipeline.core.scoring.answers import score_answer
from pipeline.core.weighing import logs_from_json
from pipeline.core.weighting import log_sum
from pipeline.view.questions import Asked, question_of
from pipeline.view.sources import Part, Source, statistics_in
from pipeline.view.stored import NoSuchPage, checksum, footer, num_rows, read_rows, reading

PER_PAGE = 16
"""Questions whose trajectories are on a page together."""
WIDEST = 8
"""Numbers of a row that a loss is told of a token which are shown."""
_OF_EVALUATION = ("question", "gold_answers", "hops", "type")


def details_of(source: Source, part: Part, page: int, asked: Asked) -> Json:
    """Of the questions `page * PER_PAGE` to the next, in the order of the part; and which stand `before` and `after`
    them in the source.

    Raises:
        NoSuchPage, UserError: there is no such page, or a file is damaged.
    """
    every = part.questions()
    start, end = page * PER_PAGE, min((page + 1) * PER_PAGE, len(every))
    if start >= end:
        raise NoSuchPage(f"{source.key}/{part.name} has no page {page}")
    ids = every.ids[start:end].to_pylist()
    starts = (every.starts[start : end + 1] - every.starts[start]).tolist()
    stored = footer(part.path).columns
    columns = [name for name in (*TRAJECTORY_SCHEMA.names, *_OF_EVALUATION) if name in stored]
    table = read_rows(part.path, int(every.starts[start]), int(every.starts[end]), columns)
    with reading(part.path):
        turns = trajectories_from_table(table)
    rows = table.select([name for name in _OF_EVALUATION if name in stored]).to_pylist()
    tasks, questions = part.tasks(), asked.of(source.split)
    examples = _examples(part, ids, asked)
    found = []
    for id_, (first, last) in zip(ids, itertools.pairwise(starts), strict=True):
        question = question_of(id_, rows[first] if rows else {}, questions)
        about = _question(question, turns[first:last], statistics_in(tasks, id_), asked)
        found.append({**about, "examples": examples.get(id_, [])})
    return {"questions": found, **_beside(source, part, start, end)}


def _beside(source: Source, part: Part, start: int, end: int) -> Json:
    """The ids of the questions before those from `start` to `end` of a part, and after them; null of none."""
    place, here = source.parts.index(part), part.questions().ids
    earlier = source.parts[place - 1].questions().ids if start == 0 and place else []
    later = (
        source.parts[place + 1].questions().ids if end == len(here) and place + 1 < len(source.parts) else []
    )
    before = here[start - 1] if start else earlier[-1] if len(earlier) else None
    after = here[end] if end < len(here) else later[0] if len(later) else None
    return {"before": before and before.as_py(), "after": after and after.as_py()}


def _question(
    question: Question, turns: Sequence[Trajectory], statistics: Mapping[str, Any], asked: Asked
) -> Json:
    of_samples = _weights(statistics)
    shown = [_turn(turn, question, of_samples.get(turn.sample, {}), asked) for turn in turns]
    prompt = shown[0]["segments"][0]["text"].strip() if shown[0]["segments"] else ""
    return {
        "id": question.id,
        "question": question.text,
        "words": checksum(question.text),
        "prompt": "" if question.text else prompt,
        "answers": list(question.answers),
        "type": question.type,
        "hops": question.hops,
        "gold": list(question.supporting_ids),
        "steps": [
            {"question": hop.question, "answer": hop.answer, "passage": hop.supporting_id}
            for hop in question.decomposition
        ],
        "turns": shown,
    }


def _weights(statistics: Mapping[str, Any]) -> dict[int, Json]:
    """By sample; the lists of a side-car run over what was scored, and `facts`, where there are any, say of which
    sample each is. The share is of the question's whole weight: null where that is zero."""
    scored = statistics.get("scored") or []
    facts = statistics.get("facts") or [{"sample": sample} for sample in range(len(scored))]
    hinted = statistics.get("hinted") or [False] * len(scored)
    logs = logs_from_json(statistics.get("log_weights") or [None] * len(scored))
    total = log_sum(logs) if logs else -np.inf
    return {
        fact["sample"]: {
            "log_likelihood": one.get("log_likelihood"),
            "log_ratio": fact.get("log_ratio"),
            "weight": float(np.exp(log)) if statistics.get("log_weights") else None,
            "weight_share": None if np.isneginf(total) else float(np.exp(log - total)),
            "hinted": hint,
        }
        for fact, one, hint, log in zip(facts, scored, hinted, logs, strict=False)
    }


def _turn(turn: Trajectory, question: Question, statistics: Json, asked: Asked) -> Json:
    score = score_answer(turn.answer, question.answers, asked.protocol)
    # An episode may have turns of several roles: of those that wrote no answer it is not known whether they were to.
    is_scored = bool(question.answers) and bool(turn.answer or turn.stop_reason is not StopReason.ANSWERED)
    return {
        "sample": turn.sample,
        "role": turn.role,
        "policy_version": turn.policy_version,
        "stop_reason": turn.stop_reason.value,
        "detail": turn.detail,
        "answer": turn.answer,
        "em": score.em if is_scored else None,
        "f1": score.f1 if is_scored else None,
        "tokens": len(turn.token_ids),
        "generated_tokens": int(turn.sampled.sum()),
        "turn_log_likelihoods": list(turn.turn_log_likelihoods),
        "segments": list(_segments(turn, asked.tokenizer(turn.role))),
        "steps": [_step(step, set(question.supporting_ids)) for step in turn.steps],
        **statistics,
    }


def _step(step: Step, gold: set[str]) -> Json:
    found = step_as_json(step)
    return {**found, "hits": [{**hit, "gold": hit["id"] in gold} for hit in found["hits"]]}


def _segments(turn: Trajectory, tokenizer: Any) -> Iterator[Json]:
    """Stretches of tokens of one kind: of the environment; of the model and trained; of the model and not trained."""
    kinds = np.where(turn.sampled, np.where(turn.loss_mask, 2, 1), 0)
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for begin, end in itertools.pairwise(borders):
        if begin == end:  # no tokens at all
            return
        ids = turn.token_ids[begin:end].tolist()
        written = bool(turn.sampled[begin])
        yield {
            "by": "model" if written else "environment",
            "trained": bool(turn.loss_mask[begin]),
            "tokens": len(ids),
            "logprob": float(turn.logprobs[begin:end].sum()) if written else None,
            "text": f"{len(ids)} tokens"
            if tokenizer is None
            else tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        }


def _examples(part: Part, ids: Sequence[str], asked: Asked) -> dict[str, list[Json]]:
    """By question its training examples: whom they train, and what the loss is told of each.

    An example is of the question that its unit is, or that its id begins with ("QUESTION/SAMPLE").
    """
    found: dict[str, list[Json]] = {}
    wanted = pa.array(ids)
    for policy, path in part.examples().items():
        if not (rows := num_rows(path)):
            continue
        names = read_rows(path, 0, rows, ["id", "unit"])
        begins = pc.replace_substring_regex(names.column("id"), "/[^/]*$", "")
        is_own = pc.or_(pc.is_in(names.column("unit"), wanted), pc.is_in(begins, wanted))
        if not len(own := np.flatnonzero(is_own)):
            continue
        table = read_rows(path, int(own[0]), int(own[-1]) + 1, EXAMPLE_SCHEMA.names).take(own - own[0])
        with reading(path):
            examples = examples_from_table(table)
        for example in examples:
            question = example.unit if example.unit in ids else example.id.rpartition("/")[0]
            about = {"policy": policy, "id": example.id, "unit": example.unit, "role": example.role}
            found.setdefault(question, []).append({**about, **_streams(example, asked)})
    return found


def _streams(example: Example, asked: Asked) -> Json:
    """Those of one number (`numbers`), and of those with more what is said of each token that is trained (`by_token`):
    a number, or the first of a row of so many (`widths`)."""
    targets = np.flatnonzero(example.loss_mask)
    targets = targets[targets > 0]
    by_token, widths = {}, {}
    for name, values in example.streams.items():
        if values.ndim > 1:
            by_token[name] = values[:, :WIDEST].tolist()
            widths[name] = values.shape[1]
        elif len(values) > 1:
            by_token[name] = values[targets].tolist()
    numbers = {name: float(values[0]) for name, values in example.streams.items() if values.shape == (1,)}
    tokens = []
    if by_token:
        tokenizer, ids = asked.tokenizer(example.role), example.token_ids[targets].tolist()
        tokens = [str(id_) if tokenizer is None else tokenizer.decode([id_]) for id_ in ids]
    return {"numbers": numbers, "tokens": tokens, "by_token": by_token, "widths": widths}
