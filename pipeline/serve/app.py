"""All routes, and the process around them.

    POST /v1/chat/completions   an answer, whole or streamed
    POST /v1/responses          the same in another form
    GET  /v1/models             what answers
    GET  /                      a page for people
    /mcp                        tools for other agents
    GET  /healthz, /readyz, /metrics

Guarantees of `serve`:
- it listens at once and answers 503 until the model is loaded; one that cannot be loaded ends it with the error;
- after SIGTERM or SIGINT new requests get 503, answers that have begun are finished within the grace period;
- SIGHUP has it look for a newer model at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.types import ASGIApp

from pipeline.core.agents.search import Event
from pipeline.serve import STATIC
from pipeline.serve.chat import ChatReply
from pipeline.serve.conversation import question_of
from pipeline.serve.failures import ApiError, as_api_error, as_refusal
from pipeline.serve.requests import Asked, ChatRequest, PassedOver, ResponsesRequest
from pipeline.serve.responses import ResponseReply
from pipeline.serve.service import Service
from pipeline.serve.streams import EventStream
from pipeline.serve.tools import tools_of
from retriever_service.service.direct import DirectRoute, direct_handlers, unknown_route
from retriever_service.service.failures import HttpError, json_response
from retriever_service.service.guard import OPEN_PATHS, Guard, unless_gone
from retriever_service.service.hosts import HostCheck, own_names
from retriever_service.service.listening import listen, url_of
from retriever_service.service.metrics import CONTENT_TYPE
from retriever_service.service.running import BACKLOG, run

PAGE = {"/": "index.html", "/chat.js": "chat.js", "/chat.css": "chat.css"}
"""Files of the page for people, by their paths."""
_STARTED = int(time.time())


class Mistake(BaseModel):
    """What is wrong with a request, or went wrong with it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The reply to a request that failed."""

    error: Mistake


class _Route(DirectRoute):
    """Tells of failures in OpenAI's form."""

    def as_failure(self, error: Exception) -> HttpError:
        return as_api_error(error)


_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in {
        400: "The request makes no sense, or asks for what is not done.",
        401: "The bearer token is missing or wrong.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too long.",
        415: "The body is not declared as application/json.",
        429: "Too many requests are in hand; come back after `Retry-After` seconds.",
        500: "A fault of the server.",
        502: "The retriever answered with what makes no sense.",
        503: "The model is being loaded, the engine or the retriever was lost, or the server is being shut down.",
        504: "Not answered before the deadline.",
    }.items()
}
router = APIRouter(route_class=_Route)


def _question_of(service: Service, body: ChatRequest | ResponsesRequest) -> tuple[str, list[str]]:
    """The question, and what of the request is passed over; all that can be refused before it is answered has been."""
    passed_over = PassedOver(service.settings.lenient)
    body.check(service.settings.name, passed_over)
    question = question_of(body.said(passed_over))
    service.check_ready()
    service.agent.check(question)
    return question, passed_over.params


async def _reply(
    request: Request, service: Service, body: Asked, question: str, reply: ChatReply | ResponseReply
) -> Response:
    if body.stream:
        return EventStream(request, reply.pieces(service, question, body.sampling), service.metrics)
    events: list[Event] = []
    answering = service.answer(question, body.sampling, events.append)
    trajectory = await unless_gone(request, answering)
    return json_response(reply.whole(trajectory, events))


@router.post("/v1/chat/completions", summary="Answer a question", responses=_FAILURES)
async def chat(request: Request, body: ChatRequest) -> Response:
    service: Service = request.app.state.service
    question, ignored = _question_of(service, body)
    options = body.stream_options
    reply = ChatReply(
        service.settings.name,
        ignored,
        with_token_ids=bool(body.return_token_ids),
        with_usage=options is not None and bool(options.include_usage),
    )
    return await _reply(request, service, body, question, reply)


@router.post("/v1/responses", summary="Answer a question, an item per step", responses=_FAILURES)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    service: Service = request.app.state.service
    question, ignored = _question_of(service, body)
    reply = ResponseReply(
        service.settings.name, body.metadata or {}, ignored, with_token_ids=bool(body.return_token_ids)
    )
    return await _reply(request, service, body, question, reply)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "exsearch",
        "exsearch": {"version": service.agent.version},
    }


@router.get("/v1/models", summary="What answers")
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(request.app.state.service)]})


@router.get("/v1/models/{name}", summary="What answers", responses={404: _FAILURES[404]})
async def model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    if name != service.settings.name:
        raise ApiError(404, "model_not_found", f"there is no model {name[:80]!r}", "model")
    return json_response(_model(service))


@router.get("/healthz", summary="Is the process alive?")
async def healthz(request: Request) -> Response:
    return json_response({"state": request.app.state.service.state})


@router.get("/readyz", summary="Are questions answered?", responses={503: _FAILURES[503]})
async def readyz(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_ready()
    return json_response({"state": service.state, "version": service.agent.version})


@router.get("/metrics", summary="Metrics for Prometheus")
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _page_of(file: str) -> Callable[[], Any]:
    async def page() -> Response:
        return FileResponse(Path(str(STATIC / file)))

    return page


def create_app(service: Service, hosts: frozenset[str] | None = None) -> ASGIApp:
    """The application, for any ASGI server with one worker process and lifespan support.

    Args:
        hosts: names that requests may be for, as in URLs; None allows all.
    """
    tools = tools_of(service)
    # Who may ask is checked in front of it, by `Guard` and `HostCheck`.
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    tools_app = tools.streamable_http_app(stateless_http=True, transport_security=unchecked)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        async with tools.session_manager.run():
            yield
            await service.close()

    app = FastAPI(
        title="ExSearch agent",
        version=version("exsearch"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: unknown_route(as_api_error)},
    )
    app.state.service = service
    app.include_router(router)
    for path, file in PAGE.items():
        app.add_api_route(path, _page_of(file), include_in_schema=False)
    app.router.routes.extend(tools_app.routes)
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        token=service.settings.token,
        direct=direct_handlers(app.routes),
        open_paths=OPEN_PATHS | PAGE.keys(),
        refuse=as_refusal,
    )
    if service.settings.allow_origins:
        # In front of `Guard`: a browser asks without the token whether a page may ask with it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,
        )
    return HostCheck(app, hosts)


def serve(service: Service, on_listening: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT; call it in the main thread.

    Args:
        on_listening: told the address as soon as there is one.

    Raises:
        RetrieverError: the address cannot be listened on, or the index is unusable.
        RunError: the engine does not start, or was lost and cannot be started again.
    """
    settings = service.settings
    with contextlib.closing(listen(settings.host, settings.port, backlog=BACKLOG)) as listener:
        url = url_of(listener)
        on_listening(url)
        hosts = own_names(settings.host, url, settings.allowed_hosts)
        run(create_app(service, hosts), service, listener, service.look_now)
