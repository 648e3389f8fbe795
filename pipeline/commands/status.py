"""How a run stands, in words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from pipeline.core.run import Json
from pipeline.core.tables import METRIC_NAMES, number, span


def in_words(status: Json) -> Iterator[str]:
    """Lines for a person; see `pipeline.core.status`."""
    process, iterations = status["process"], status["iterations"]
    who = f" (process {process['pid']} on {process['host']})" if process["pid"] else ""
    reason = f": {status['reason']}" if status["reason"] else ""
    yield f"{status['run']}: {status['state']}{who}{reason}"
    if process["started"]:
        yield f"started {process['started']}, last word {process['updated']}; started {status['starts']} times in all"
    if status["phase"]:
        yield _phase(status["phase"])
    left = f", about {_time(status['seconds_left'])} left" if status["seconds_left"] is not None else ""
    yield f"iterations finished: {iterations['finished']} of {iterations['of']}{left}"
    for name, seconds in status["steps"].items():
        yield f"  {name}" + (f": {_time(seconds)}" if seconds is not None else "")
    if status["dev"]:
        yield "dev scores in percent, and 95 % intervals:"
    for row in status["dev"]:
        metrics = [name.removesuffix("_interval") for name in row if name.endswith("_interval")]
        scores = ", ".join(_score(row, metric) for metric in metrics)
        yield f"  {row['iteration']}: {scores}" + (", the best" if row["is_best"] else "")
    for name, rate in status["rates"].items():
        if rate is not None:
            yield f"{name.removesuffix('_per_s').replace('_', ' ')}: {rate:,.0f}/s"
    counts = ", ".join(f"{name} {count}" for name, count in status["failures"].items())
    yield f"trajectories lost: {counts}"
    restarts = ", ".join(f"{kind} {count}" for kind, count in status["restarts"].items())
    yield f"actors restarted: {restarts}"
    if (mirror := status["mirror"]) is not None:
        error = f"; the last attempt failed: {mirror['last_error']}" if mirror["last_error"] else ""
        yield (
            f"copy: {mirror['url']}, {mirror['files']} files, {mirror['bytes'] / 1e6:,.1f} MB, as of "
            f"{mirror['updated']}, {mirror['behind']} behind, {mirror['failures']} failed attempts{error}"
        )
    for policy, versions in status["removed_models"].items():
        yield f"models of {policy} that did not stay: {', '.join(map(str, versions))}"
    yield f"warnings: {status['warnings']}" + (", the last:" if status["warnings"] else "")
    yield from (f"  {line}" for line in status["last_warnings"])


def _score(row: Json, metric: str) -> str:
    interval = span(row[f"{metric}_interval"])
    return f"{METRIC_NAMES.get(metric, metric)} {number(row[metric])}" + (
        f" ({interval})" if interval else ""
    )


def _phase(phase: Json) -> str:
    text = f"phase: {phase['name']}, for {_time(phase['seconds'])}"
    if phase["total"]:
        text += f", {phase['done']:,.0f} of {phase['total']:,.0f} {phase['unit']}"
    if phase["rate_per_s"]:
        text += f", {phase['rate_per_s']:,.2f}/s"
    if phase["seconds_left"] is not None:
        text += f", about {_time(phase['seconds_left'])} left"
    return text


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
