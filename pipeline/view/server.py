"""The pages over HTTP, for a browser on the same machine.

    GET /            the page, and the files beside it
    GET /api/NAME    a page of data (`pipeline.view.pages`) as JSON

It only reads. A request whose Host is not the server's own is refused, so that no page of another site gets at the runs
by a name that it has made point here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.errors import UserError
from pipeline.view import STATIC
from pipeline.view.pages import Pages
from pipeline.view.sources import NoSuchPage
from retriever_service.service.listening import listen, url_of

logger = logging.getLogger(__name__)

_BACKLOG = 64
_SMALLEST_ZIPPED, _ZIP_LEVEL = 2_000, 1
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of every answer."""
_EVERYWHERE = ("0.0.0.0", "::")
"""Addresses that listen on all of a machine: whoever chooses one has names for it that are not known here."""


def create_app(pages: Pages, hosts: frozenset[str] | None) -> ASGIApp:
    """The application. `hosts`: names that requests may be for, as in URLs; None allows all."""

    async def data(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(pages.page, request.path_params["name"]))
        except NoSuchPage as error:
            return JSONResponse({"error": str(error)}, status_code=404)
        except UserError as error:
            logger.warning(str(error))
            return JSONResponse({"error": str(error)}, status_code=500)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; what it printed says why"}, status_code=500)

    app = Starlette(
        routes=[Route("/api/{name:path}", data), Mount("/", StaticFiles(directory=str(STATIC), html=True))],
        middleware=[Middleware(GZipMiddleware, minimum_size=_SMALLEST_ZIPPED, compresslevel=_ZIP_LEVEL)],
        exception_handlers={Exception: failed},
    )
    return _Guard(app, hosts)


def serve(pages: Pages, host: str, port: int, on_listening: Callable[[str], None]) -> None:
    """Serve until it is interrupted.

    Raises:
        RetrieverError: the address cannot be listened on.
    """
    with contextlib.closing(listen(host, port, backlog=_BACKLOG)) as listener:
        threading.Thread(target=pages.prepare, daemon=True).start()
        url = url_of(listener)
        on_listening(url)
        own = {"localhost", "127.0.0.1", "[::1]", host, _name_in(urlsplit(url).netloc)}
        config = uvicorn.Config(
            create_app(pages, None if host in _EVERYWHERE else frozenset(own)),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _name_in(host: str) -> str:
    """Without the port: "[::1]:80" is "[::1]"."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


class _Guard:
    """ASGI middleware: answers nobody who asks for another host, and adds `HEADERS` to every answer.

    Starlette's own middleware for hosts cuts an IPv6 address at its first colon.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        asked = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._hosts is not None and _name_in(asked.lower()) not in self._hosts:
            refusal = PlainTextResponse("this server is not known by that name", status_code=400)
            await refusal(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)
