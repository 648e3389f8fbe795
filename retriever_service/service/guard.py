"""What happens to every HTTP request before and around its route: token, size, time, and the count of it."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_service.service.failures import HttpError
from retriever_service.service.metrics import HttpMetrics

T = TypeVar("T")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Answered without a token: whoever asks them has none as a rule."""
_CLIENT_GONE = 499
"""Nobody reads this status; it is for the metrics."""


class Guard:
    """ASGI middleware: refuses requests without the token, counts and times all of them.

    Written against ASGI itself: Starlette's base class for middlewares adds two tasks to every request.

    Args:
        direct: routes, by method and path, whose handlers are called from here. Starlette's router tries one route
            after the other, and FastAPI opens two exit stacks that they do not need: a third of the server's time.
        open_paths: answered without a token.
        refuse: the reply to who has no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: HttpMetrics,
        token: str | None,
        direct: Mapping[tuple[str, str], tuple[BaseRoute, Handler]],
        open_paths: frozenset[str] = OPEN_PATHS,
        refuse: Callable[[HttpError], Response] = HttpError.response,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._direct = direct
        self._open_paths, self._refuse = open_paths, refuse
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_allowed(scope):
                found = self._direct.get((scope["method"], scope["path"]))
                if found is None:
                    await self._app(scope, receive, note_status)
                else:
                    scope["route"], handle = found
                    response = await handle(Request(scope, receive))
                    await response(scope, receive, note_status)
            else:
                self._metrics.note_error("unauthorised")
                await self._refuse(_unauthorised())(scope, receive, note_status)
        finally:
            route = scope.get("route")
            path = "other" if route is None else route.path
            self._metrics.note_request(path, status, time.perf_counter() - started)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in self._open_paths:
            return True
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token)


def _unauthorised() -> HttpError:
    return HttpError(
        401,
        "unauthorised",
        "this server wants the header `Authorization: Bearer TOKEN`",
        {"WWW-Authenticate": "Bearer"},
    )


async def read_json_body(request: Request, *, max_bytes: int, deadline_s: float) -> bytes:
    """The body of a request, which is read no further than `max_bytes`.

    Raises:
        HttpError: it is longer, or too slow, or not declared as JSON.
    """
    # Web pages may send other types to any address without asking; JSON they may not.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(
            415, "unsupported_media_type", "send JSON, with the header `Content-Type: application/json`"
        )
    too_long = HttpError(
        413, "too_large", f"the body is longer than {max_bytes:,} bytes; send less at a time"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise HttpError(_CLIENT_GONE, "client_gone", "the client has gone")
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise HttpError(408, "slow_body", f"the body did not arrive within {deadline_s} s") from error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; it is cancelled if the client hangs up. The body has been read.

    Raises:
        HttpError: the client has gone.
        Whatever `work` raises.
    """
    task = asyncio.current_task()
    assert task is not None  # a request is always handled in a task
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise HttpError(_CLIENT_GONE, "client_gone", "the client has gone") from None
    finally:
        watcher.cancel()
