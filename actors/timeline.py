"""A timeline of one iteration: what each actor was called for, and when, in the trace format that Perfetto opens.

Calls of one actor that overlap, such as the questions that a rollout worker has in hand, are on lanes of their own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

CALL = "task::"
"""What Ray's events of whole calls begin with; behind it class and method."""
DRIVER = "driver"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, in microseconds since the epoch."""

    name: str
    start: float
    end: float


class Timeline:
    """Notes the steps of the driver, and takes the calls of all actors from Ray."""

    def __init__(self) -> None:
        self._steps: list[Span] = []
        self._begun = _now()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of the driver while the block runs."""
        start = _now()
        try:
            yield
        finally:
            self._steps.append(Span(name, start, _now()))

    def has(self, beginning: str) -> bool:
        """Whether a step whose name begins so was noted."""
        return any(step.name.startswith(beginning) for step in self._steps)

    def trace(self) -> dict[str, Any]:
        """All that happened since this was made. Ray keeps the newest 100,000 calls of a cluster by default
        (`RAY_task_events_max_num_task_in_gcs`), those of the last second may be missing."""
        calls = [event for event in ray.timeline() if event["ts"] + event["dur"] >= self._begun]
        return trace_of(calls, self._steps)


def trace_of(events: Sequence[Mapping[str, Any]], steps: Sequence[Span]) -> dict[str, Any]:
    """In the format of Chrome's trace viewer.

    Args:
        events: of `ray.timeline()`.
        steps: of the driver.
    """
    actors: dict[tuple[str, str], list[Span]] = {}
    classes: dict[tuple[str, str], str] = {}
    for event in events:
        if event["cat"].startswith(CALL):
            actor, (class_name, _, method) = (
                (event["pid"], event["tid"]),
                event["cat"].removeprefix(CALL).rpartition("."),
            )
            classes[actor] = class_name or "function"
            actors.setdefault(actor, []).append(Span(method, event["ts"], event["ts"] + event["dur"]))
    made = _process(0, DRIVER, steps)
    numbers = {name: itertools.count() for name in classes.values()}
    for process, (actor, spans) in enumerate(sorted(actors.items(), key=lambda it: classes[it[0]]), start=1):
        name = f"{classes[actor]} {next(numbers[classes[actor]])} on {actor[0]}"
        made += _process(process, name, spans)
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def _process(number: int, name: str, spans: Sequence[Span]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": number, "name": "process_sort_index", "args": {"sort_index": number}},
    ]
    ends: list[float] = []
    for span in sorted(spans, key=lambda it: (it.start, -it.end)):
        lane = next((lane for lane, end in enumerate(ends) if end <= span.start), len(ends))
        ends[lane : lane + 1] = [span.end]
        made.append(
            {
                "ph": "X",
                "pid": number,
                "tid": lane,
                "name": span.name,
                "ts": span.start,
                "dur": span.end - span.start,
            }
        )
    return made


def _now() -> float:
    return time.time() * 1e6
