"""Trajectories that are scored, for tests of weights."""

from __future__ import annotations

from typing import Any

from pipeline.core.weighting import Gold, Scored


def one(value: float, num_tokens: int = 3, **others: Any) -> Scored:
    """A trajectory of a question with one gold answer."""
    return Scored.of([Gold(value, num_tokens)], **others)
