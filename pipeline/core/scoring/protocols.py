"""A whole file of predictions by the protocol of its data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.core.records import Evidence, Question
from pipeline.core.scoring.answers import ProtocolName
from pipeline.core.scoring.intervals import bootstrap, wilson
from pipeline.core.scoring.metrics import SCORES
from pipeline.core.scoring.prediction import EVIDENCE, NOTHING, Prediction


def score_predictions(
    protocol: ProtocolName,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The data set's own scores of predictions by question id, ready for JSON.

    Args:
        questions: not empty, with `Question.evidence` where more than answers is to be scored.
        predictions: those of other questions are not looked at.

    Returns:
        protocol        its name
        n               number of questions; one without a prediction counts 0
        predicted       number of questions with an answer
        scores          {metric: percent}, mean over the questions that it can be told of
        counted         {metric: number of these}: those of evidence need a row that has some
        intervals       {metric: [low, high]}, 95 %; null if `bootstrap_samples` is 0 and the metric is no share
    """
    own = [predictions.get(question.id, NOTHING) for question in questions]
    parts = [part for part in EVIDENCE if any(getattr(one, part) is not None for one in own)]
    rows = [SCORES[protocol](q, prediction, parts) for q, prediction in zip(questions, own, strict=True)]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {
        "protocol": protocol,
        "n": len(questions),
        "predicted": sum(one.answer is not None for one in own),
        "scores": {name: 100.0 * float(np.mean(column)) for name, column in values.items()},
        "counted": {name: len(column) for name, column in values.items()},
        "intervals": {
            name: _interval(name, column, bootstrap_samples, seed) for name, column in values.items()
        },
    }


def what_is_missing(protocol: ProtocolName, questions: Sequence[Question]) -> str:
    """Which fields the official script looks at that no question has, in words; empty if there are all."""
    rows = [question.evidence or Evidence() for question in questions]
    looked_at = {field: any(has(row) for row in rows) for field, has in _LOOKED_AT.get(protocol, {}).items()}
    return " and ".join(field for field, present in looked_at.items() if not present)


_FACTS: Mapping[str, Callable[[Evidence], object]] = {"supporting_facts": lambda row: row.supporting_facts}
_LOOKED_AT: Mapping[ProtocolName, Mapping[str, Callable[[Evidence], object]]] = {
    "hotpotqa": _FACTS,
    "2wikimultihopqa": {
        **_FACTS,
        "evidences": lambda row: row.triples,
        "entity_aliases": lambda row: row.aliases,
    },
    "musique": {"paragraphs": lambda row: row.context},
    "kilt": {"provenance": lambda row: any(row.provenance)},
}


def _interval(name: str, values: Sequence[float], samples: int, seed: int) -> list[float] | None:
    # By its name: a metric that is no share has the same kind of interval where all its values happen to be 0 or 1.
    if name == "accuracy" or name.endswith("em"):
        return [100.0 * bound for bound in wilson(int(sum(values)), len(values))]
    return [100.0 * bound for bound in bootstrap(values, samples, seed)] if samples else None
