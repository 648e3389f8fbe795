"""Iterations of a run as their steps record them, for tests of reports."""

from __future__ import annotations

from typing import Any

from pipeline.core.run import RunDirectory


def scores(em: float, f1: float = 0.0) -> dict[str, Any]:
    return {"n": 10, "em": em, "f1": f1, "accuracy": em}


def evaluated(run: RunDirectory, *ems: float, f1: tuple[float, ...] = ()) -> None:
    """Iterations 0, 1, ... with these dev scores."""
    for t, em in enumerate(ems):
        dev = scores(em, f1[t] if f1 else 0.0)
        run.once(f"{t}/evaluation", lambda dev=dev: {"push": {"searcher": {"seconds": 0.1}}, "scores": dev})  # type: ignore[misc]
