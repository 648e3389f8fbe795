"""The tables of an experiment, in Markdown. The same results give the same text."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.experiments.results import ArmResult, Asked, Results, differences
from pipeline.core.experiments.spec import TableName
from pipeline.core.scoring.answers import METRICS
from pipeline.core.scoring.comparisons import Estimate, Table, difference_table, holm, score_estimate

LEVEL = 0.05
"""Below it a corrected p-value is marked."""
COLUMNS = 120


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm with the baseline: the difference, its p-value among all of a table, and of how much it is."""

    difference: Estimate
    corrected_p: float
    questions: int
    seeds: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """An arm after an iteration, the mean over its runs; dev in [0, 1]."""

    iteration: int
    dev: float
    tokens: float
    seconds: float


def curve(found: ArmResult) -> list[CurvePoint]:
    """The iterations of an arm; empty where it looks at another's runs."""
    points = []
    for t in range(found.last_iteration + 1):
        here = [point for run in found.runs for point in run.points if point.iteration == t]
        if here:
            dev = statistics.mean(statistics.mean(point.dev.values()) for point in here)
            tokens = statistics.mean(point.tokens for point in here)
            points.append(CurvePoint(t, dev, tokens, statistics.mean(point.seconds for point in here)))
    return points


def make_table(name: TableName, results: Results) -> str:
    """One table with what has to be said of it."""
    return TABLES[name](results)


# ---------------------------------------------------------------- test questions


def _test(results: Results) -> str:
    baseline, metric = results.baseline, METRICS[results.experiment.spec.metric]
    seeds = [seed for seed in results.experiment.spec.seeds if any(_of_seed(a, seed) for a in results.arms)]
    compared = _compared(results)
    head = [f"test {metric}", *(f"seed {seed}" for seed in seeds), "mean (sd)", "95 %"]
    if compared and baseline:
        head += [f"minus {baseline.arm.name}", "95 %", "p (Holm)" if len(compared) > 1 else "p"]
    rows, notes = [], []
    for found in results.arms:
        name, (ids, scores) = found.arm.name, found.tests()
        by_seed = {run.seed: statistics.mean(run.test.values()) for run in found.runs}
        row = [name, *(_percent(by_seed[s]) if s in by_seed else "" for s in seeds)]
        row += [_spread(list(by_seed.values())), _range(score_estimate(scores)) if ids else ""]
        if comparison := compared.get(name):
            row += [_signed(comparison.difference.mean), _signed_range(comparison.difference)]
            row += [_p(comparison.corrected_p)]
            if comparison.questions < len(found.questions):
                notes.append(
                    f"{name} is compared on the {comparison.questions} questions that all runs of both have."
                )
            if comparison.seeds < len(found.runs):
                notes.append(f"{name} is compared on {comparison.seeds} of its {len(found.runs)} seeds.")
        elif baseline and found is not baseline:
            notes.append(f"{name} has no seed, or no question, in common with {baseline.arm.name}.")
        rows.append(row + [""] * (len(head) - len(row)))
    return _with_notes(_table(head, rows), notes)


def _of_seed(found: ArmResult, seed: int) -> bool:
    return any(run.seed == seed for run in found.runs)


def _compared(results: Results) -> dict[str, Comparison]:
    """By arm, corrected for all of them; without arms that share no seed or no question with the baseline."""
    baseline = results.baseline
    if baseline is None:
        return {}
    tables = {
        found.arm.name: table
        for found in results.arms
        if found is not baseline and (table := differences(found, baseline)[1]).size
    }
    estimates = {name: difference_table(table) for name, table in tables.items()}
    corrected = holm([estimate.p for estimate in estimates.values()])
    return {
        name: Comparison(estimate, p, tables[name].shape[1], tables[name].shape[0])
        for (name, estimate), p in zip(estimates.items(), corrected, strict=True)
    }


# ---------------------------------------------------------------- groups of test questions


def _hops(results: Results) -> str:
    return _by_group(results, "hops", lambda q: "" if q.hops is None else f"{q.hops} hop{'s' * (q.hops > 1)}")


def _types(results: Results) -> str:
    return _by_group(results, "types", lambda q: q.type)


def _by_group(results: Results, what: str, label: Callable[[Asked], str]) -> str:
    """A column for each group; an asterisk where an arm differs from the baseline."""
    groups = sorted({label(q) for found in results.arms for q in found.questions.values()} - {""})
    if not groups:
        return f"No test question names its {what}."
    cells: dict[tuple[str, str], Estimate] = {}
    pairs: dict[tuple[str, str], Estimate] = {}
    for found in results.arms:
        for group in groups:
            if (own := _of_group(*found.tests(), found, group, label)).size:
                cells[found.arm.name, group] = score_estimate(own)
            if results.baseline is None or found is results.baseline:
                continue
            if (pair := _of_group(*differences(found, results.baseline), found, group, label)).size:
                pairs[found.arm.name, group] = difference_table(pair)
    corrected = dict(zip(pairs, holm([estimate.p for estimate in pairs.values()]), strict=True))

    def cell(name: str, group: str) -> str:
        if (estimate := cells.get((name, group))) is None:
            return ""
        mark = " \\*" if corrected.get((name, group), 1.0) < LEVEL else ""
        return f"{_percent(estimate.mean)} ({_range(estimate)}){mark}"

    counts = {group: max(_count(found, group, label) for found in results.arms) for group in groups}
    head = [
        f"test {METRICS[results.experiment.spec.metric]}",
        *(f"{group} ({counts[group]})" for group in groups),
    ]
    rows = [[found.arm.name, *(cell(found.arm.name, group) for group in groups)] for found in results.arms]
    notes = []
    if pairs and results.baseline:
        notes = [
            f"\\* differs from {results.baseline.arm.name}: p below {LEVEL}, corrected for the {len(pairs)} "
            "comparisons of this table."
        ]
    return _with_notes(_table(head, rows), notes)


def _of_group(
    ids: Sequence[str], table: Table, found: ArmResult, group: str, label: Callable[[Asked], str]
) -> Table:
    """The columns of a table that are of a group."""
    return table[:, [i for i, id_ in enumerate(ids) if label(found.questions[id_]) == group]]


def _count(found: ArmResult, group: str, label: Callable[[Asked], str]) -> int:
    return sum(label(question) == group for question in found.questions.values())


# ---------------------------------------------------------------- searches


def _searches(results: Results) -> str:
    """How much was searched for in the test, and found; mean and standard deviation over the seeds."""
    columns = {"searches": "searches", "gold recall": "gold_recall", "all gold passages found": "all_gold"}
    rows = []
    for found in results.arms:
        row = [found.arm.name]
        for key in columns.values():
            values = [told for run in found.runs if (told := run.told[key]) is not None]
            # Searches are counted, the others are percentages already.
            row.append(_mean_and_deviation(values, 2 if key == "searches" else 1) if values else "")
        rows.append(row)
    return _table(["in the test", *columns], rows)


# ---------------------------------------------------------------- iterations, and what they cost


def _iterations(results: Results) -> str:
    """Dev scores after each iteration, with their intervals."""
    arms = [found for found in results.arms if found.last_iteration >= 0]
    last = max((found.last_iteration for found in arms), default=-1)
    if last < 0:
        return "No run has scored dev questions."
    head = [f"dev {METRICS[results.experiment.spec.metric]} after iteration", *map(str, range(last + 1))]
    rows = []
    for found in arms:
        estimates = [
            score_estimate(dev) if (dev := found.dev(t)) is not None and dev.size else None
            for t in range(last + 1)
        ]
        cells = ["" if e is None else f"{_percent(e.mean)} ({_range(e)})" for e in estimates]
        rows.append([found.arm.name, *cells])
    return _table(head, rows)


def _cost(results: Results) -> str:
    """Tokens that were generated for training, and time, against dev scores; means over the seeds."""
    metric = METRICS[results.experiment.spec.metric]
    curves = {found.arm.name: points for found in results.arms if (points := curve(found))}
    if not curves:
        return "No run has scored dev questions."
    own = curves.get(results.experiment.baseline.name)
    equal = min(points[-1].tokens for points in curves.values())
    head = [
        "",
        "tokens",
        "s",
        f"dev {metric} at {equal:,.0f} tokens",
        f"best dev {metric}",
        "tokens to it",
        "s to it",
    ]
    if own:
        against = results.experiment.baseline.name
        head += [f"tokens of {against} to the same", f"s of {against}"]
    rows = []
    for name, points in curves.items():
        best = max(points, key=lambda point: point.dev)
        at_equal = float(np.interp(equal, [p.tokens for p in points], [p.dev for p in points]))
        row = [name, f"{points[-1].tokens:,.0f}", f"{points[-1].seconds:,.0f}", _percent(at_equal)]
        row += [_percent(best.dev), f"{best.tokens:,.0f}", f"{best.seconds:,.0f}"]
        if own:
            same = next((point for point in own if point.dev >= best.dev), None)
            row += ["not reached", ""] if same is None else [f"{same.tokens:,.0f}", f"{same.seconds:,.0f}"]
        rows.append(row)
    note = (
        "Tokens are those that were generated for training, seconds those of all steps up to there, dev evaluations "
        "among them; between two iterations dev scores are interpolated."
    )
    return _with_notes(_table(head, rows), [note])


TABLES: dict[TableName, Callable[[Results], str]] = {
    "test": _test,
    "hops": _hops,
    "types": _types,
    "searches": _searches,
    "iterations": _iterations,
    "cost": _cost,
}


# ---------------------------------------------------------------- text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _with_notes(table: str, notes: Sequence[str]) -> str:
    return table if not notes else "\n\n".join([table, "\n".join(map(prose, notes))])


def prose(text: str) -> str:
    """Text in lines as the pages have them; tables have lines of their own length."""
    return textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(shares: Sequence[float]) -> str:
    return _mean_and_deviation([100 * share for share in shares], 1)


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else mean


def _range(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _signed_range(estimate: Estimate) -> str:
    return f"{_signed(estimate.low)} to {_signed(estimate.high)}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
