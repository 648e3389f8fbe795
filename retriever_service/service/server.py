"""The HTTP service: an ASGI application, and a process around it.

    app = create_app(ServerSettings(), lambda: SearchEngine.open("indexes/wiki"))

Guarantees of `serve`:
- it listens at once and answers 503 until the index is ready; an index that cannot be opened ends it with the
  error;
- after SIGTERM or SIGINT new requests get 503, those it holds are answered, and it returns within the grace
  period;
- what was acknowledged by then, or at the time of any kill, is on disk: the engine's updates are durable.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from retriever_service.service.direct import direct_handlers, unknown_route
from retriever_service.service.failures import as_http_error, responses
from retriever_service.service.guard import OPEN_PATHS, Guard
from retriever_service.service.lifecycle import Engine, Service
from retriever_service.service.listening import listen, url_of
from retriever_service.service.routes import reading, writing
from retriever_service.service.running import BACKLOG, run
from retriever_service.service.settings import ServerSettings

__all__ = ["Engine", "ServerSettings", "create_app", "serve"]

_SWITCH_S = 0.0005


def create_app(settings: ServerSettings, open_engine: Callable[[], Engine]) -> FastAPI:
    """The application, for any ASGI server with one worker process and lifespan support.

    Args:
        open_engine: makes the engine; called once, in the thread that will own it.
    """
    service = Service(settings, open_engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.openapi()  # imports what it needs, and is kept
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="ExSearch retriever",
        version=version("exsearch"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: unknown_route(as_http_error)},
    )
    app.state.service = service
    app.include_router(reading)
    if not settings.read_only:
        app.include_router(writing)
    app.add_middleware(
        Guard, metrics=service.metrics, token=settings.token, direct=direct_handlers(app.routes)
    )
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            settings.limits.describe(schema)
            if settings.token is not None:
                _describe_token(schema)
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def serve(
    settings: ServerSettings,
    open_engine: Callable[[], Engine],
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT; call it in the main thread.

    If the owner thread is still busy at the end of the grace period, the process ends here, with status 0:
    what it was doing has been acknowledged to nobody.

    Args:
        on_listening: told the address as soon as there is one.

    Raises:
        RetrieverError: the address cannot be listened on, or the index or encoder is unusable.
    """
    # The owner thread waits for the interpreter several times per batch, while the event loop sends the last answers;
    # by default for 5 ms each time.
    sys.setswitchinterval(_SWITCH_S)
    with contextlib.closing(listen(settings.host, settings.port, backlog=BACKLOG)) as listener:
        on_listening(url_of(listener))
        app = create_app(settings, open_engine)
        run(app, app.state.service, listener)


def _describe_token(schema: dict[str, Any]) -> None:
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for path, operations in schema["paths"].items():
        if path in OPEN_PATHS:
            continue
        for operation in operations.values():
            operation["security"] = [{"token": []}]
            operation["responses"]["401"] = {
                "description": responses(401)[401]["description"],
                "content": error,
            }
