"""An answer in the form of OpenAI's responses: an item per step.

    think, select, record, call, result   an item `reasoning`
    search                                an item `file_search_call` with its query and the passages
    answer                                an item `message`, with a `file_citation` per cited passage

What is streamed and what is answered whole is made by the same `ResponseReply`, event by event.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.agents.search import Event
from pipeline.core.records import StopReason, Trajectory
from pipeline.serve.chat import KEEP_ALIVE
from pipeline.serve.service import Service, events_of
from pipeline.serve.streams import IDLE_S, line
from pipeline.serve.told import cited, extension_of, in_words, usage_of

Json = dict[str, Any]


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(slots=True)
class ResponseReply:
    """One reply in the making. Its events are told in their order, and numbered."""

    model: str
    metadata: dict[str, str]
    ignored: Sequence[str] = ()
    with_token_ids: bool = False
    id: str = field(default_factory=lambda: _new_id("resp"))
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[Json] = field(default_factory=list)
    _number: int = -1

    def whole(self, trajectory: Trajectory, events: list[Event]) -> Json:
        """Without streaming."""
        for event in events:
            for _ in self._step(event):
                pass
        for _ in self._answer(trajectory):
            pass
        return self._response(trajectory)

    async def pieces(self, service: Service, question: str, sampling: Any) -> AsyncGenerator[bytes, None]:
        """Streamed."""
        async for event in events_of(service, question, sampling, IDLE_S):
            if self._number < 0:
                for kind in ("response.created", "response.in_progress"):
                    yield self._event(kind, response=self._response(None))
            if event is None:
                yield KEEP_ALIVE
                continue
            if isinstance(event, Event):
                for piece in self._step(event):
                    yield piece
                continue
            for piece in self._answer(event):
                yield piece
            done = self._response(event)
            yield self._event(f"response.{done['status']}", response=done)

    # ---------------------------------------------------------------- items

    def _step(self, event: Event) -> Iterator[bytes]:
        if event.kind == "search":
            yield from self._searched(event)
        elif event.kind not in ("answer", "stop"):
            yield from self._thought(in_words(event))

    def _thought(self, words: str) -> Iterator[bytes]:
        item = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []}
        place = {"item_id": item["id"], "output_index": len(self.output), "content_index": 0}
        part = {"type": "reasoning_text", "text": words}
        done = {**item, "content": [part], "status": "completed"}
        yield self._added({**item, "status": "in_progress"})
        yield self._event("response.reasoning_text.delta", **place, delta=words)
        yield self._event("response.reasoning_text.done", **place, text=words)
        yield self._done(done)

    def _searched(self, event: Event) -> Iterator[bytes]:
        item: Json = {"id": _new_id("fs"), "type": "file_search_call", "queries": [event.text]}
        place = {"item_id": item["id"], "output_index": len(self.output)}
        results = [
            {
                "file_id": hit.passage.id,
                "filename": hit.passage.title,
                "text": hit.passage.text,
                "score": hit.score,
                "attributes": {},
            }
            for hit in event.hits
        ]
        yield self._added({**item, "status": "in_progress", "results": None})
        for stage in ("in_progress", "searching", "completed"):
            yield self._event(f"response.file_search_call.{stage}", **place)
        yield self._done({**item, "status": "completed", "results": results})

    def _answer(self, trajectory: Trajectory) -> Iterator[bytes]:
        item: Json = {"id": _new_id("msg"), "type": "message", "role": "assistant"}
        place = {"item_id": item["id"], "output_index": len(self.output), "content_index": 0}
        text = trajectory.answer
        notes = [
            {
                "type": "file_citation",
                "file_id": citation.passage_id,
                "filename": citation.title,
                "index": len(text),  # the whole answer is what is cited
            }
            for citation in cited(trajectory)
        ]
        empty: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        part = {**empty, "text": text, "annotations": notes}
        yield self._added({**item, "status": "in_progress", "content": []})
        yield self._event("response.content_part.added", **place, part=empty)
        yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
        for number, note in enumerate(notes):
            yield self._event(
                "response.output_text.annotation.added", **place, annotation_index=number, annotation=note
            )
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=part)
        status = "incomplete" if _is_cut(trajectory) else "completed"
        yield self._done({**item, "status": status, "content": [part]})

    # ---------------------------------------------------------------- the whole

    def _response(self, trajectory: Trajectory | None) -> Json:
        """As it stands; without a trajectory it is in progress."""
        head: Json = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": self.metadata,
            "output": list(self.output),
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "usage": None,
        }
        if trajectory is None:
            return head
        usage, is_cut = usage_of(trajectory), _is_cut(trajectory)
        return head | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                # The form demands both numbers. They are not known: what the engine had in its cache is another number
                # in every turn, while `input_tokens` counts each token once.
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.total,
            },
            "exsearch": extension_of(trajectory, self.ignored, with_token_ids=self.with_token_ids),
        }

    def _added(self, item: Json) -> bytes:
        return self._event("response.output_item.added", output_index=len(self.output), item=item)

    def _done(self, item: Json) -> bytes:
        self.output.append(item)
        return self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return line({"type": kind, "sequence_number": self._number, **fields}, kind)


def _is_cut(trajectory: Trajectory) -> bool:
    return trajectory.stop_reason is StopReason.LENGTH_LIMIT
