"""The trajectories of some questions as text: turn by turn, what was written, found, trained and weighed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.record_tables import TRAJECTORY_SCHEMA, trajectories_from_table
from pipeline.core.records import Question, Step, Trajectory
from pipeline.core.run import Json, finite
from pipeline.core.scoring.answers import score_answer
from pipeline.view.questions import Asked
from pipeline.view.rows import question_of, tasks_of
from pipeline.view.sources import Part, Source

PER_PAGE = 16
"""Questions whose trajectories are on a page together."""
_OF_EVALUATION = ("question", "gold_answers", "hops", "type")


def details_of(source: Source, part: Part, page: int, asked: Asked) -> Json:
    """Of the questions `page * PER_PAGE` to the next, in the order of the part.

    Raises:
        IndexError: there is no such page.
    """
    ids = pq.read_table(part.path, columns=["question_id"]).column("question_id").to_pylist()
    groups = [(id_, len(list(own))) for id_, own in itertools.groupby(ids)]
    first = sum(length for _, length in groups[: page * PER_PAGE])
    groups = groups[page * PER_PAGE : (page + 1) * PER_PAGE]
    if not groups:
        raise IndexError(f"page {page}")
    stored = set(pq.read_schema(part.path).names)
    columns = [name for name in (*TRAJECTORY_SCHEMA.names, *_OF_EVALUATION) if name in stored]
    table = pq.read_table(part.path, columns=columns).slice(first, sum(length for _, length in groups))
    turns = iter(trajectories_from_table(table))
    asked_in_table = table.select([name for name in _OF_EVALUATION if name in stored]).to_pylist()
    tasks, questions = tasks_of(part), asked.of(source.split)
    streams = _streams(part, {id_ for id_, _ in groups})
    found, place = [], 0
    for id_, length in groups:
        question = question_of(id_, asked_in_table[place : place + 1], questions)
        own = list(itertools.islice(turns, length))
        statistics = (tasks.get(id_) or {}).get("statistics", {})
        found.append({**_question(question, own, statistics, asked), "examples": streams.get(id_, [])})
        place += length
    return {"questions": found}


def _question(
    question: Question, turns: Sequence[Trajectory], statistics: Mapping[str, Any], asked: Asked
) -> Json:
    of_samples = _statistics(statistics)
    return {
        "id": question.id,
        "question": question.text or _prompt(turns[0], asked),
        "answers": list(question.answers),
        "type": question.type,
        "hops": question.hops,
        "gold": list(question.supporting_ids),
        "steps": [
            {"question": hop.question, "answer": hop.answer, "passage": hop.supporting_id}
            for hop in question.decomposition
        ],
        "turns": [_turn(turn, question, of_samples.get(turn.sample, {}), asked) for turn in turns],
    }


def _streams(part: Part, ids: set[str]) -> dict[str, list[Json]]:
    """By question its training examples: whom they train, and of their streams those of one number."""
    found: dict[str, list[Json]] = {}
    for policy, path in part.examples.items():
        for row in pq.read_table(path, columns=["id", "unit", "role", "streams"]).to_pylist():
            question = next(
                (name for name in (row["unit"], row["id"].rpartition("/")[0]) if name in ids), None
            )
            if question is not None:
                numbers = {name: s["values"][0] for name, s in row["streams"] if len(s["values"]) == 1}
                about = {"policy": policy, "id": row["id"], "unit": row["unit"], "role": row["role"]}
                found.setdefault(question, []).append({**about, "numbers": numbers})
    return found


def _prompt(turn: Trajectory, asked: Asked) -> str:
    (first, *_) = _segments(turn, asked.tokenizer)
    return str(first["text"]).strip()


def _statistics(statistics: Mapping[str, Any]) -> dict[int, Json]:
    """By sample; the lists of a side-car run over what was scored. The share is of the question's whole weight."""
    facts, scored = statistics.get("facts") or [], statistics.get("scored") or []
    log_weights = statistics.get("log_weights") or [None] * len(facts)
    hinted = statistics.get("hinted") or [False] * len(facts)
    rows = list(zip(facts, scored, log_weights, hinted, strict=False))
    highest = max((weight for *_, weight, _ in rows if weight is not None), default=0.0)
    shares = [0.0 if weight is None else math.exp(weight - highest) for *_, weight, _ in rows]
    return {
        fact["sample"]: {
            "log_likelihood": one.get("log_likelihood"),
            "log_ratio": fact.get("log_ratio"),
            "log_weight": weight,
            "weight_share": share / sum(shares) if statistics.get("log_weights") else None,
            "hinted": hint,
        }
        for (fact, one, weight, hint), share in zip(rows, shares, strict=True)
    }


def _turn(turn: Trajectory, question: Question, statistics: Json, asked: Asked) -> Json:
    score = score_answer(turn.answer, question.answers, asked.protocol)
    logprobs = turn.logprobs[turn.sampled]
    found: Json = finite(
        {
            "sample": turn.sample,
            "role": turn.role,
            "policy_version": turn.policy_version,
            "stop_reason": turn.stop_reason.value,
            "detail": turn.detail,
            "answer": turn.answer,
            "em": score.em if question.answers else None,
            "f1": score.f1 if question.answers else None,
            "tokens": len(turn.token_ids),
            "generated_tokens": int(turn.sampled.sum()),
            "logprob": float(logprobs.sum()) if len(logprobs) else None,
            "log_likelihoods": list(turn.log_likelihoods),
            "turn_log_likelihoods": list(turn.turn_log_likelihoods),
            "segments": list(_segments(turn, asked.tokenizer)),
            "steps": [_step(step, set(question.supporting_ids)) for step in turn.steps],
            **statistics,
        }
    )
    return found


def _step(step: Step, gold: set[str]) -> Json:
    return {
        "query": step.query,
        "record": step.record,
        "selected": list(step.selected),
        "action": step.action,
        "result": step.result,
        "hits": [
            {
                "id": hit.passage.id,
                "title": hit.passage.title,
                "text": hit.passage.text,
                "score": hit.score,
                "gold": hit.passage.id in gold,
            }
            for hit in step.hits
        ],
    }


def _segments(turn: Trajectory, tokenizer: Any) -> Iterator[Json]:
    """Stretches of tokens of one kind: of the environment; of the model and trained; of the model and not trained."""
    kinds = np.where(turn.sampled, np.where(turn.loss_mask, 2, 1), 0)
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for begin, end in itertools.pairwise(borders):
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
