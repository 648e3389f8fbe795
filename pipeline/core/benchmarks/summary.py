"""The figures of a benchmark: by task and domain, over tasks, domains and queries, and what instructions change.

A mean over a domain is the mean of its tasks; `tasks` is the mean of all tasks, `domains` the mean of the domains
(ToolRet's "Average" of its categories), `queries` the mean of all queries (what MAIR's program prints as "Avg").

Intervals (95 %) are of a bootstrap over the queries of each task, tasks and domains as they are: they say how far the
same tasks with other queries would differ, and nothing of other tasks. Arms are compared query by query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.benchmarks.spec import Arm
from pipeline.core.scoring.intervals import Interval, bootstrap
from pipeline.core.scoring.paired import judged_differences, resampled_means

Array = npt.NDArray[np.float64]
Values = Mapping[str, Mapping[Arm, Mapping[str, Sequence[float]]]]
"""Of one retriever: by task, arm and measure the value of each query, in [0, 1]; arms of a task have the same
queries."""
Weights = Mapping[str, float]
"""What one mean is over: its tasks, with weights that sum to 1."""
TASKS, DOMAINS, QUERIES = "tasks", "domains", "queries"


def _evenly(tasks: Sequence[str]) -> Weights:
    return dict.fromkeys(tasks, 1 / len(tasks))


def scopes_of(domains: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, dict[str, Weights]]:
    """The scopes of a set of tasks, by kind (`tasks`, `domains`, `means`) and name.

    Args:
        domains: of each task.
        sizes: number of queries of each task.
    """
    by_domain: dict[str, list[str]] = {}
    for task in sizes:
        by_domain.setdefault(domains[task], []).append(task)
    total = sum(sizes.values())
    share = 1 / max(1, len(by_domain))
    return {
        "tasks": {task: {task: 1.0} for task in sizes},
        "domains": {name: _evenly(tasks) for name, tasks in by_domain.items()},
        "means": {
            TASKS: _evenly(list(sizes)),
            DOMAINS: {t: share / len(tasks) for tasks in by_domain.values() for t in tasks},
            QUERIES: {task: size / total for task, size in sizes.items()},
        },
    }


def summarise(
    values: Values, domains: Mapping[str, str], measures: Sequence[str], samples: int, seed: int
) -> dict[str, Any]:
    """The figures of one retriever, ready for JSON, in percent.

    Each scope has by arm the measures and the interval of the first one; where tasks have both arms, `difference` is
    with minus without on those. `gains` counts the tasks with a difference above and below 0 and at 0; `gained_surely`
    and `lost_surely` those of which the interval of the difference does not reach 0.

    Args:
        domains: of each task.
        samples, seed: of the bootstrap.
    """
    main = measures[0]
    found: dict[str, dict[str, Any]] = {"tasks": {}, "domains": {}, "means": {}}
    arms: list[Arm] = list(dict.fromkeys(arm for by_arm in values.values() for arm in by_arm))
    for arm in arms:
        by_task = {task: by_arm[arm] for task, by_arm in values.items() if arm in by_arm}
        rows = {task: np.asarray(of[main], dtype=np.float64) for task, of in by_task.items()}
        means = {task: {name: float(np.mean(of[name])) for name in measures} for task, of in by_task.items()}
        drawn = _drawn(rows, samples, seed)
        for kind, named in scopes_of(domains, {task: len(row) for task, row in rows.items()}).items():
            for name, weights in named.items():
                figures = found[kind].setdefault(name, {})
                figures[arm] = {
                    "queries": sum(len(rows[task]) for task in weights),
                    "tasks": len(weights),
                    **{m: 100 * sum(w * means[t][m] for t, w in weights.items()) for m in measures},
                    "interval": _percent(_interval(weights, rows, drawn, samples, seed)),
                }
    return found | _compared(values, domains, main, found, samples, seed)


def _compared(
    values: Values,
    domains: Mapping[str, str],
    main: str,
    found: dict[str, dict[str, Any]],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Puts a `difference` into each scope that has both arms; returns `gains`."""
    pairs = {
        task: np.asarray(by_arm["with"][main], dtype=np.float64) - np.asarray(by_arm["without"][main])
        for task, by_arm in values.items()
        if len(by_arm) == 2
    }
    if not pairs:
        return {"gains": None}
    drawn = _drawn(pairs, samples, seed)
    for kind, named in scopes_of(domains, {task: len(row) for task, row in pairs.items()}).items():
        for name, weights in named.items():
            difference = sum(w * float(pairs[t].mean()) for t, w in weights.items())
            if len(weights) == 1:
                (task,) = weights
                interval, p_value = judged_differences(pairs[task], drawn[task])
            else:
                # As if all queries were one sample: so many that differ, in resamples of the weighted mean.
                means = _weighted(weights, drawn)
                interval, p_value = judged_differences(np.concatenate([pairs[t] for t in weights]), means)
            found[kind][name]["difference"] = {
                "tasks": len(weights),
                "difference": 100 * difference,
                "interval": _percent(interval),
                "p_value": p_value,
            }
    by_task = [found["tasks"][task]["difference"] for task in pairs]
    signs = [np.sign(row["difference"]) for row in by_task]
    return {
        "gains": {
            "tasks": len(by_task),
            "gained": signs.count(1),
            "lost": signs.count(-1),
            "equal": signs.count(0),
            "gained_surely": sum(row["interval"][0] > 0 for row in by_task),
            "lost_surely": sum(row["interval"][1] < 0 for row in by_task),
        }
    }


def _drawn(rows: Mapping[str, Array], samples: int, seed: int) -> dict[str, Array]:
    """Resampled means of each task, [samples]; each task is drawn by itself."""
    return {
        task: resampled_means(row[np.newaxis], samples, seed + number)[:, 0]
        for number, (task, row) in enumerate(rows.items())
    }


def _weighted(weights: Weights, drawn: Mapping[str, Array]) -> Array:
    total: Array = np.sum([weight * drawn[task] for task, weight in weights.items()], axis=0)
    return total


def _interval(
    weights: Weights, rows: Mapping[str, Array], drawn: Mapping[str, Array], samples: int, seed: int
) -> Interval:
    if len(weights) == 1:
        (task,) = weights
        return bootstrap(list(rows[task]), samples, seed)
    low, high = np.percentile(_weighted(weights, drawn), [2.5, 97.5])
    return float(low), float(high)


def _percent(interval: Interval) -> list[float]:
    return [100 * bound for bound in interval]
