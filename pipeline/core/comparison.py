"""Evaluations of the same questions beside each other: for `exsearch compare`, and for a report of its own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError
from pipeline.core.question_scores import METRICS, SHARES, Scores
from pipeline.core.run import Json
from pipeline.core.scoring.paired import (
    Comparison,
    compare_means,
    compare_shares,
    probabilities_of_best,
)

Rows = npt.NDArray[np.bool_]


def compare(a: Scores, b: Scores, samples: int, seed: int) -> Json:
    """Everything about two evaluations, ready for JSON; scores in percent, differences b - a.

    Args:
        b: of the same questions as `a`, in the same order (`pair_up`).
        samples: resamples of the bootstraps; 0: F1 and recall have no interval and no p-value.

    Returns:
        all          {metric: comparison} (`Comparison.in_percent`), metrics that no question has left out
        by_hops      {group: the same}, over questions that name theirs; by_type as well
        changed      the questions with another EM: those that b gained, then those that it lost, each in their order
    """
    groups = {"by_hops": ["" if hops is None else str(hops) for hops in a.hops], "by_type": list(a.types)}
    return {
        "all": compare_metrics(a, b, samples, seed),
        **{
            name: {
                label: compare_metrics(a, b, samples, seed, rows=np.array([own == label for own in labels]))
                for label in sorted(set(labels) - {""})
            }
            for name, labels in groups.items()
        },
        "changed": _changed(a, b),
    }


def compare_metrics(
    a: Scores,
    b: Scores,
    samples: int,
    seed: int,
    metrics: Sequence[str] = METRICS,
    rows: Rows | None = None,
) -> dict[str, Json]:
    """By metric the comparison over the questions that both have it of; `rows` of them, None: all."""
    found: dict[str, Json] = {}
    for name in metrics:
        both = ~np.isnan(a.values[name]) & ~np.isnan(b.values[name])
        chosen = both if rows is None else both & rows
        if chosen.any():
            found[name] = _one(
                name, a.values[name][chosen], b.values[name][chosen], samples, seed
            ).in_percent()
    return found


def _one(
    metric: str, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], samples: int, seed: int
) -> Comparison:
    return compare_shares(a, b) if metric in SHARES else compare_means(a, b, samples, seed)


def _changed(a: Scores, b: Scores) -> list[Json]:
    change = b.values["em"] - a.values["em"]
    return [
        {
            "id": a.ids[row],
            "change": change_name,
            "question": a.questions[row],
            "gold_answers": list(a.gold_answers[row]),
            "hops": a.hops[row],
            "type": a.types[row],
            "a": a.answers[row],
            "b": b.answers[row],
        }
        for change_name, rows in (("gained", change > 0), ("lost", change < 0))
        for row in np.flatnonzero(rows).tolist()
    ]


def pair_up(a: Scores, b: Scores, names: tuple[str, str]) -> Scores:
    """`b` in the order of `a`.

    Raises:
        UserError: they are not of the same questions, and says how many differ, and one; or scored by other rules.
    """
    (only_a, only_b), (name_a, name_b) = (set(a.ids) - set(b.ids), set(b.ids) - set(a.ids)), names
    check_comparable(a, b, names)
    if only_a or only_b:
        example = min(only_a or only_b)
        raise UserError(
            f"{name_a} and {name_b} do not have the same questions: of {len(a)} and {len(b)} they share "
            f"{len(set(a.ids) & set(b.ids))}; {example!r} is only in {name_a if only_a else name_b}. {_SAME_QUESTIONS}"
        )
    return b.in_order_of(a)


_SAME_QUESTIONS = (
    "paired tests need the same questions: give both runs the same question files, limits and data.seed (or seed), "
    "or score both on the same split with exsearch evaluate --out"
)


def check_comparable(a: Scores, b: Scores, names: tuple[str, str]) -> None:
    """What two evaluations have in common is the same: the rules, and under an id the question.

    Raises:
        UserError: it is not, and says what differs.
    """
    name_a, name_b = names
    if a.protocol != b.protocol:
        raise UserError(
            f"{name_a} was scored by evaluation.protocol: {a.protocol}, {name_b} by {b.protocol}; score one of both "
            "again with exsearch evaluate --protocol NAME --out FILE.json, and compare FILE.parquet"
        )
    if others := [id_ for id_ in a.ids if b.asked.get(id_, a.asked[id_]) != a.asked[id_]]:
        (text_a, _), (text_b, _) = a.asked[others[0]], b.asked[others[0]]
        what = f"{text_a!r} and {text_b!r}" if text_a != text_b else "other gold answers"
        raise UserError(
            f"{name_a} and {name_b} do not have the same questions: {len(others)} of {len(a)} ids name others, say "
            f"{others[0]!r}: {what}. {_SAME_QUESTIONS}"
        )


def paired_tests(tests: Mapping[str, Scores], samples: int, seed: int) -> list[Json]:
    """EM and F1 of every two tests of one run, later ones less earlier ones; those of other questions are left out."""
    names = list(tests)
    return [
        {
            "a": a,
            "b": b,
            **compare_metrics(tests[a], tests[b].in_order_of(tests[a]), samples, seed, ("em", "f1")),
        }
        for place, b in enumerate(names)
        for a in names[:place]
        if tests[a].asked == tests[b].asked
    ]


def selection(dev: Mapping[int, Scores], selected: int, metric: str, samples: int, seed: int) -> Json | None:
    """How sure it is that the selected iteration is the best, from the dev scores of all of them by question.

    Args:
        metric: that it was selected by.
        samples: 0: no probabilities, and no p-values but McNemar's.

    Returns:
        `{"by": metric, "questions", "iterations": [row, ...]}`, a row having its `iteration`, `score`,
        `probability_best` (that it were selected if the dev questions were drawn again), and against the selected one
        `difference`, `interval`, `p_value`, null in its own row. None where the iterations have not all the same
        questions, or the selected one is not among them.
    """
    if selected not in dev or any(scores.asked != dev[selected].asked for scores in dev.values()):
        return None
    best = dev[selected]
    values = {t: scores.in_order_of(best).values[metric] for t, scores in sorted(dev.items())}
    probabilities = (
        probabilities_of_best(np.stack(list(values.values())), samples, seed).tolist()
        if samples
        else [None] * len(values)
    )
    rows: list[Json] = []
    for (t, own), probability in zip(values.items(), probabilities, strict=True):
        against = (
            None if t == selected else _one(metric, best.values[metric], own, samples, seed).in_percent()
        )
        told = {name: against[name] if against else None for name in ("difference", "interval", "p_value")}
        score = 100.0 * float(own.mean())
        rows.append({"iteration": t, "score": score, "probability_best": probability, **told})
    return {"by": metric, "questions": len(best), "iterations": rows}
