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
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from pipeline.core.errors import UserError
from pipeline.view import STATIC
from pipeline.view.pages import Pages
from pipeline.view.stored import NoSuchPage
from retriever_service.service.hosts import HostCheck, own_names
from retriever_service.service.listening import listen, url_of

logger = logging.getLogger(__name__)

_BACKLOG = 64
_SMALLEST_ZIPPED, _ZIP_LEVEL = 2_000, 1


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
    return HostCheck(app, hosts)


def serve(
    pages: Pages,
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    on_listening: Callable[[str], None],
) -> None:
    """Serve until it is interrupted.

    Args:
        allowed_hosts: names that it answers to beside its own.

    Raises:
        RetrieverError: the address cannot be listened on.
    """
    with contextlib.closing(listen(host, port, backlog=_BACKLOG)) as listener:
        threading.Thread(target=pages.prepare, daemon=True).start()
        url = url_of(listener)
        on_listening(url)
        config = uvicorn.Config(
            create_app(pages, own_names(host, url, allowed_hosts)),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
