"""Events as they happen, over HTTP (server-sent events)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.serve.failures import as_api_error
from retriever_service.service.guard import unless_gone
from retriever_service.service.metrics import HttpMetrics

IDLE_S = 15.0
"""After so many seconds without an event a comment is sent, so that nobody on the way takes the stream for dead."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def line(data: Any, event: str | None = None) -> bytes:
    """One event with JSON, or a bare word."""
    body = data.encode() if isinstance(data, str) else pydantic_core.to_json(data)
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + body + b"\n\n"


class EventStream(Response):
    """Sends what an iterator gives. If the client goes, the iterator is closed, and what it awaits ends.

    A failure before the first piece is an ordinary reply with its status, a later one an event `error`.
    """

    def __init__(self, request: Request, pieces: AsyncGenerator[bytes, None], metrics: HttpMetrics) -> None:
        super().__init__()
        self._request, self._pieces, self._metrics = request, pieces, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._has_begun = False
        try:
            await unless_gone(self._request, self._send_all(send))
        # Here every failure ends, as in `DirectRoute`.
        except Exception as error:
            failure = as_api_error(error)
            self._metrics.note_error(failure.kind)
            if not self._has_begun:
                await failure.response()(scope, receive, send)
                return
            await _send(send, line(failure.body(), "error"), more=False)

    async def _send_all(self, send: Send) -> None:
        try:
            async for piece in self._pieces:
                if not self._has_begun:
                    self._has_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await _send(send, piece, more=True)
        finally:
            await self._pieces.aclose()
        await _send(send, b"", more=False)


async def _send(send: Send, piece: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": more})
