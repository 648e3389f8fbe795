"""The routes of the HTTP service: a request is checked, put to the service, and answered in its dialect."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import PlainTextResponse

from retriever_service.errors import RetrieverUnavailable
from retriever_service.passages.hits import DEFAULT_OPTIONS, SearchOptions
from retriever_service.service.batching import Answers
from retriever_service.service.direct import DirectRoute
from retriever_service.service.failures import json_response, responses
from retriever_service.service.guard import unless_gone
from retriever_service.service.lifecycle import Service, State
from retriever_service.service.metrics import CONTENT_TYPE
from retriever_service.service.wire import (
    EXSEARCH_K,
    EXSEARCH_MOST_K,
    SEARCH_R1_TOPK,
    AddRequest,
    DeleteRequest,
    ExSearchReply,
    InfoReply,
    RetrieveReply,
    RetrieveRequest,
    SearchReply,
    SearchRequest,
    StateReply,
    UpdateReply,
    exsearch_reply,
    retrieve_reply,
    search_reply,
)

_VERSION = version("exsearch")
_WITH_BODY = (400, 408, 413, 415, 422)
_WORKING = (429, 500, 503, 504)


async def _ask(
    request: Request,
    queries: Sequence[str],
    k: int,
    options: SearchOptions = DEFAULT_OPTIONS,
    deadline_s: float | None = None,
) -> Answers:
    service: Service = request.app.state.service
    settings = service.settings
    settings.limits.check(queries, k, options.rerank)
    deadline_s = settings.deadline_s if deadline_s is None else min(deadline_s, settings.deadline_s)
    return await unless_gone(request, service.ask(queries, k, options, deadline_s))


reading = APIRouter(route_class=DirectRoute)
writing = APIRouter(route_class=DirectRoute)


@reading.post(
    "/search",
    summary="Search, with everything that the library can do",
    responses={200: {"model": SearchReply}, **responses(*_WITH_BODY, *_WORKING)},
)
async def search(request: Request, body: SearchRequest) -> Response:
    answers = await _ask(request, body.all_queries, body.k, body.options, body.deadline_s)
    return json_response(search_reply(answers))


@reading.post(
    "/retrieve",
    summary="Search, as a Search-R1 retrieval server",
    responses={200: {"model": RetrieveReply}, **responses(*_WITH_BODY, *_WORKING)},
)
async def retrieve(request: Request, body: RetrieveRequest) -> Response:
    answers = await _ask(request, body.all_queries, SEARCH_R1_TOPK if body.topk is None else body.topk)
    return json_response(retrieve_reply(answers, return_scores=body.return_scores))


@reading.get(
    "/api/search",
    summary="Search, as the original ExSearch server",
    responses={200: {"model": ExSearchReply}, **responses(422, *_WORKING)},
)
async def api_search(
    request: Request,
    query: Annotated[str, Query()],
    k: Annotated[
        int, Query(ge=1, description=f"Passages wanted; at most {EXSEARCH_MOST_K} come.")
    ] = EXSEARCH_K,
) -> Response:
    service: Service = request.app.state.service
    service.settings.limits.check([query], k)
    answers = await _ask(request, [query], min(k, EXSEARCH_MOST_K))
    return json_response(exsearch_reply(query, answers.hits[0]))


@reading.get(
    "/info",
    summary="What is being served",
    responses={200: {"model": InfoReply}, **responses(*_WORKING)},
)
async def info(request: Request) -> Response:
    service: Service = request.app.state.service
    engine, fingerprint = await service.run(lambda engine: engine.info())
    return json_response(InfoReply(index=fingerprint, version=_VERSION, engine=engine))


@reading.get("/healthz", summary="Is the process alive?", responses={200: {"model": StateReply}})
async def healthz(request: Request) -> Response:
    return json_response(StateReply(state=request.app.state.service.state))


@reading.get(
    "/readyz",
    summary="Are queries answered?",
    responses={200: {"model": StateReply}, **responses(503)},
)
async def readyz(request: Request) -> Response:
    service: Service = request.app.state.service
    if service.state is not State.READY:
        raise RetrieverUnavailable(f"the retriever is not ready: {service.state}")
    return json_response(StateReply(state=service.state))


@reading.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@writing.post(
    "/passages",
    summary="Add passages; they are on disk when this is answered",
    responses={200: {"model": UpdateReply}, **responses(*_WITH_BODY, *_WORKING)},
)
async def add(request: Request, body: AddRequest) -> Response:
    service: Service = request.app.state.service
    passages = body.to_passages()
    count, fingerprint = await service.run(lambda engine: engine.add(passages))
    return json_response(UpdateReply(passages=count, index=fingerprint))


@writing.delete(
    "/passages",
    summary="Delete passages; they are gone from the disk's index when this is answered",
    responses={200: {"model": UpdateReply}, **responses(*_WITH_BODY, *_WORKING)},
)
async def delete(request: Request, body: DeleteRequest) -> Response:
    service: Service = request.app.state.service
    count, fingerprint = await service.run(lambda engine: engine.delete(body.ids))
    return json_response(UpdateReply(passages=count, index=fingerprint))
