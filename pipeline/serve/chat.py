"""An answer in the form of OpenAI's chat completions.

Thoughts, searches and records are `reasoning_content`, in words, as chat interfaces show them; each is also there for
programs, in `exsearch.event` of its chunk. They are no `tool_calls`: a client would take those as its own to make.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.agents.search import Event
from pipeline.core.records import StopReason, Trajectory
from pipeline.serve.service import Service, events_of
from pipeline.serve.streams import IDLE_S, line
from pipeline.serve.told import event_as_json, extension_of, in_words, usage_of

KEEP_ALIVE = b": nothing new\n\n"


@dataclass(slots=True)
class ChatReply:
    """One reply in the making: the same head on all of its parts."""

    model: str
    ignored: Sequence[str] = ()
    with_token_ids: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, trajectory: Trajectory, events: list[Event]) -> dict[str, Any]:
        """Without streaming."""
        message = {
            "role": "assistant",
            "content": trajectory.answer,
            "refusal": None,
            "reasoning_content": "".join(map(in_words, events)),
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _finish_reason(trajectory),
        }
        return {
            **self._head("chat.completion", trajectory.policy_version),
            "choices": [choice],
            "usage": _usage(trajectory),
            "exsearch": extension_of(trajectory, self.ignored, with_token_ids=self.with_token_ids),
        }

    async def pieces(self, service: Service, question: str, sampling: Any) -> AsyncGenerator[bytes, None]:
        """Streamed."""
        version, has_begun = service.agent.version, False
        async for event in events_of(service, question, sampling, IDLE_S):
            if not has_begun:
                has_begun = True
                yield self._chunk(version, {"role": "assistant", "content": ""})
            if event is None:
                yield KEEP_ALIVE
            elif isinstance(event, Event):
                delta = (
                    {"content": event.text}
                    if event.kind == "answer"
                    else {"reasoning_content": in_words(event)}
                )
                yield self._chunk(version, delta, extension={"event": event_as_json(event)})
            else:
                yield self._last(event)
                if self.with_usage:
                    head = self._head("chat.completion.chunk", event.policy_version)
                    yield line({**head, "choices": [], "usage": _usage(event)})
        yield line("[DONE]")

    def _last(self, trajectory: Trajectory) -> bytes:
        extension = extension_of(trajectory, self.ignored, with_token_ids=self.with_token_ids)
        return self._chunk(trajectory.policy_version, {}, _finish_reason(trajectory), extension)

    def _chunk(
        self,
        version: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        extension: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk", version), "choices": [choice]}
        return line(chunk if extension is None else {**chunk, "exsearch": extension})

    def _head(self, kind: str, version: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"version-{version}",
        }


def _finish_reason(trajectory: Trajectory) -> str:
    return "length" if trajectory.stop_reason is StopReason.LENGTH_LIMIT else "stop"


def _usage(trajectory: Trajectory) -> dict[str, Any]:
    usage = usage_of(trajectory)
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
