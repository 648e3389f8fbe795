"""One answer, for programs: what happened on the way, how many tokens it took, where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.agents.search import Event
from pipeline.core.records import Trajectory, step_as_json
from pipeline.serve.citations import Citation, citations_of
from retriever_service.passages.hits import Hit


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer.

    Attributes:
        prompt: that the agent read: the question, and all that it was shown on the way.
        completion: that it wrote.
        reasoning: of these, in front of the answer.
    """

    prompt: int
    completion: int
    reasoning: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def usage_of(trajectory: Trajectory) -> Usage:
    """Tokens of the whole trajectory, each counted once."""
    written = trajectory.sampled
    completion = int(np.count_nonzero(written))
    reasoning = int(np.count_nonzero(written[: trajectory.answer_start]))
    return Usage(len(trajectory.token_ids) - completion, completion, reasoning)


def cited(trajectory: Trajectory) -> list[Citation]:
    """The citations of an answer."""
    return citations_of(trajectory.answer, trajectory.steps)


def extension_of(trajectory: Trajectory, ignored: Sequence[str], *, with_token_ids: bool) -> dict[str, Any]:
    """The field `exsearch` of a reply: what OpenAI's form has no place for.

    Args:
        ignored: what the request asked for and did not get.
    """
    said: dict[str, Any] = {
        "version": trajectory.policy_version,
        "stop_reason": trajectory.stop_reason.value,
        "citations": [citation.as_json() for citation in cited(trajectory)],
        "steps": [step_as_json(step) for step in trajectory.steps],
        "ignored": list(ignored),
    }
    return said | ({"token_ids": trajectory.token_ids.tolist()} if with_token_ids else {})


def hits_as_json(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Passages, the best first."""
    return [
        {"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score} for h in hits
    ]


def event_as_json(event: Event) -> dict[str, Any]:
    """One step as it happens: `{"type", "text"}`, and `passages` where it found or chose some."""
    told: dict[str, Any] = {"type": event.kind, "text": event.text}
    return told | ({"passages": hits_as_json(event.hits)} if event.kind in ("search", "select") else {})


def in_words(event: Event) -> str:
    """One step for people, a line or several; empty for what is no step."""
    if event.kind in ("answer", "stop"):
        return ""
    lines = [f"{event.kind.capitalize()}: {event.text}"]
    if event.kind == "search":
        lines = [f"Found for {event.text!r}:" if event.hits else f"Found nothing for {event.text!r}"]
        lines += [
            f"  [{rank}] {hit.passage.title or hit.passage.id}"
            for rank, hit in enumerate(event.hits, start=1)
        ]
    return "\n".join(lines) + "\n"
