"""The trace of an iteration, from Ray's events and the driver's steps."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from actors.timeline import Span, Timeline, trace_of


def call(actor: str, name: str, start: float, seconds: float, node: str = "10.0.0.1") -> dict[str, Any]:
    """As `ray.timeline` has it; beside it there are events of what is within a call."""
    return {"cat": f"task::{name}", "pid": node, "tid": f"worker:{actor}", "ts": start, "dur": seconds}


def spans_of(trace: dict[str, Any]) -> list[tuple[str, int, str, float, float]]:
    """Process, lane, name, start and duration of each."""
    names = {it["pid"]: it["args"]["name"] for it in trace["traceEvents"] if it["name"] == "process_name"}
    return [
        (names[it["pid"]], it["tid"], it["name"], it["ts"], it["dur"])
        for it in trace["traceEvents"]
        if it["ph"] == "X"
    ]


def test_each_actor_is_a_process_with_its_class_and_the_driver_is_the_first() -> None:
    events = [
        call("b", "RolloutWorker.rollout", 10, 5),
        call("a", "RolloutWorker.rollout", 11, 5, "10.0.0.2"),
        call("c", "LearnerRank.train", 20, 9),
        {**call("c", "x", 20, 9), "cat": "task:execute"},
    ]
    assert spans_of(trace_of(events, [Span("1/sample", 9, 19)])) == [
        ("driver", 0, "1/sample", 9, 10),
        ("LearnerRank 0 on 10.0.0.1", 0, "train", 20, 9),
        ("RolloutWorker 0 on 10.0.0.1", 0, "rollout", 10, 5),
        ("RolloutWorker 1 on 10.0.0.2", 0, "rollout", 11, 5),
    ]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1))
def test_calls_of_one_lane_never_overlap_and_no_lane_is_there_for_nothing(
    times: list[tuple[int, int]],
) -> None:
    spans = spans_of(trace_of([call("a", "A.work", start, seconds) for start, seconds in times], []))
    assert sorted((start, seconds) for *_, start, seconds in spans) == sorted(times)
    lanes = {lane: sorted(s[3:] for s in spans if s[1] == lane) for lane in {s[1] for s in spans}}
    for calls in lanes.values():
        assert all(start + seconds <= later for (start, seconds), (later, _) in itertools.pairwise(calls))
    at_once = max(sum(start <= moment < start + s for start, s in times) for moment, _ in times)
    assert len(lanes) == at_once


def test_what_an_earlier_iteration_did_is_not_in_it(monkeypatch: Any) -> None:
    timeline = Timeline()
    before, now = call("a", "A.old", 5, 5), call("a", "A.new", timeline._begun + 1, 2)
    monkeypatch.setattr("ray.timeline", lambda: [before, now])
    with timeline.step("1/sample"):
        pass
    assert [name for _, _, name, *_ in spans_of(timeline.trace())] == ["1/sample", "new"]
