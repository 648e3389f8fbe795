"""The trajectories of some questions as text: turn by turn, what was written, found, trained and weighed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.record_tables import TRAJECTORY_SCHEMA, trajectories_from_table
from pipeline.core.records import Question, Step, StopReason, Trajectory, step_as_json
from pipeline.core.run import Json
from pipeline.core.scoring.answers import score_answer
from pipeline.core.weighing import logs_from_json
from pipeline.core.weighting import log_sum
from pipeline.view.questions import Asked, question_of
from pipeline.view.sources import NoSuchPage, Part, Source, reading, statistics_in

PER_PAGE = 16
"""Questions whose trajectories are on a page together."""
_OF_EVALUATION = ("question", "gold_answers", "hops", "type")


def details_of(source: Source, part: Part, page: int, asked: Asked) -> Json:
    """Of the questions `page * PER_PAGE` to the next, in the order of the part.

    Raises:
        NoSuchPage, UserError: there is no such page, or a file is damaged.
    """
    every = part.questions()
    groups = every[page * PER_PAGE : (page + 1) * PER_PAGE]
    if not groups:
        raise NoSuchPage(f"{source.key}/{part.name} has no page {page}")
    first = sum(length for _, length in every[: page * PER_PAGE])
    stored = part.schema()
    with reading(part.path):
        columns = [name for name in (*TRAJECTORY_SCHEMA.names, *_OF_EVALUATION) if name in stored]
        table = pq.read_table(part.path, columns=columns).slice(first, sum(length for _, length in groups))
        turns = trajectories_from_table(table)
    asked_in_table = table.select([name for name in _OF_EVALUATION if name in stored]).to_pylist()
    tasks, questions = part.tasks(), asked.of(source.split)
    examples = _examples(part, [id_ for id_, _ in groups])
    found, place = [], 0
    for id_, length in groups:
        row = asked_in_table[place] if asked_in_table else {}
        own, statistics = turns[place : place + length], statistics_in(tasks, id_)
        about = _question(question_of(id_, row, questions), own, statistics, asked)
        found.append({**about, "examples": examples.get(id_, [])})
        place += length
    return {"questions": found}


def _question(
    question: Question, turns: Sequence[Trajectory], statistics: Mapping[str, Any], asked: Asked
) -> Json:
    of_samples = _weights(statistics)
    shown = [_turn(turn, question, of_samples.get(turn.sample, {}), asked) for turn in turns]
    prompt = shown[0]["segments"][0]["text"].strip() if shown[0]["segments"] else ""
    return {
        "id": question.id,
        "question": question.text,
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


def _examples(part: Part, ids: Sequence[str]) -> dict[str, list[Json]]:
    """By question its training examples: whom they train, and of their streams those of one number.

    An example is of the question that its unit is, or that its id begins with ("QUESTION/SAMPLE").
    """
    found: dict[str, list[Json]] = {}
    for policy, path in part.examples().items():
        with reading(path):
            table = pq.read_table(path, columns=["id", "unit", "role", "streams"])
            begins = pc.replace_substring_regex(table.column("id"), "/[^/]*$", "")
            wanted = pa.array(ids)
            table = table.filter(pc.or_(pc.is_in(table.column("unit"), wanted), pc.is_in(begins, wanted)))
        for row in table.to_pylist():
            question = row["unit"] if row["unit"] in ids else row["id"].rpartition("/")[0]
            numbers = {name: s["values"][0] for name, s in row["streams"] if len(s["values"]) == 1}
            about = {"policy": policy, "id": row["id"], "unit": row["unit"], "role": row["role"]}
            found.setdefault(question, []).append({**about, "numbers": numbers})
    return found
