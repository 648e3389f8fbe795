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
from importlib.resources import files

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.errors import UserError
from pipeline.view.pages import NoSuchPage, Pages
from retriever_service.errors import RetrieverError
from retriever_service.service.listening import listen, url_of

logger = logging.getLogger(__name__)

STATIC = files("pipeline.view") / "static"
_BACKLOG = 64
_SMALLEST_ZIPPED = 2_000
_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", b"default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_EVERYWHERE = ("0.0.0.0", "::")
"""Addresses that listen on all of a machine: whoever chooses one has names for it that are not known here."""


def create_app(pages: Pages, hosts: list[str]) -> Starlette:
    """The application. `hosts`: names that requests may be for; ["*"] allows all."""

    async def data(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(pages.page, request.path_params["name"]))
        except NoSuchPage as error:
            return JSONResponse({"error": str(error)}, status_code=404)
        except (UserError, RetrieverError) as error:
            logger.warning(str(error))
            return JSONResponse({"error": str(error)}, status_code=500)

    return Starlette(
        routes=[Route("/api/{name:path}", data), Mount("/", StaticFiles(directory=str(STATIC), html=True))],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(_Headers),
            Middleware(GZipMiddleware, minimum_size=_SMALLEST_ZIPPED),
        ],
    )


def serve(pages: Pages, host: str, port: int, on_listening: Callable[[str], None]) -> None:
    """Serve until it is interrupted.

    Raises:
        RetrieverError: the address cannot be listened on.
    """
    with contextlib.closing(listen(host, port, backlog=_BACKLOG)) as listener:
        threading.Thread(target=pages.prepare, daemon=True).start()
        on_listening(url_of(listener))
        hosts = ["*"] if host in _EVERYWHERE else sorted({host, "localhost", "127.0.0.1", "::1"})
        config = uvicorn.Config(
            create_app(pages, hosts), ws="none", log_config=None, access_log=False, server_header=False
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


class _Headers:
    """ASGI middleware that adds `_HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
