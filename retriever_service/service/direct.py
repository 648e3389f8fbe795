"""Routes that read, check and answer requests themselves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute

from retriever_service.service.failures import HttpError, as_http_error
from retriever_service.service.guard import Handler, read_json_body


class DirectRoute(APIRoute):
    """Calls its endpoint with the checked body, and sends the finished reply as it is; failures become replies.

    FastAPI's own way reads, checks and copies bodies and replies in Python, which costs more than all the rest of
    a request here. Signatures still say what is described in the OpenAPI schema. The application's `state.service` has
    `metrics`, and `settings` with the bounds of a body.
    """

    def as_failure(self, error: Exception) -> HttpError:
        """How a client is told of `error`."""
        return as_http_error(error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        call = super().get_route_handler() if self.body_field is None else self._call_with_body

        async def handle(request: Request) -> Response:
            try:
                return await call(request)
            # Here every failure ends: it is the client's to know, and the log's.
            except Exception as error:
                failure = self.as_failure(error)
                request.app.state.service.metrics.note_error(failure.kind)
                return failure.response()

        return handle

    async def _call_with_body(self, request: Request) -> Response:
        settings = request.app.state.service.settings
        body = await read_json_body(
            request, max_bytes=settings.limits.max_body_bytes, deadline_s=settings.body_deadline_s
        )
        (parameter,) = self.dependant.body_params
        model: type[BaseModel] = parameter.field_info.annotation  # type: ignore[assignment]
        reply: Response = await self.endpoint(request, model.model_validate_json(body))
        return reply


def direct_handlers(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], tuple[BaseRoute, Handler]]:
    """Routes that take nothing from a request but its body, by method and path, with their handlers."""
    return {
        (method, route.path): (route, route.get_route_handler())
        for route in routes
        if isinstance(route, DirectRoute) and route.body_field is not None
        for method in route.methods
    }


def unknown_route(
    as_failure: Callable[[Exception], HttpError],
) -> Callable[[Request, Exception], Coroutine[Any, Any, Response]]:
    """A handler that puts 404 and 405 in the form of all other failures, which `as_failure` gives."""

    async def handle(request: Request, error: Exception) -> Response:
        failure = as_failure(error)
        if failure.status == 405:
            # Starlette names the methods of one route only, where a path has several.
            routes = [r for r in request.app.routes if getattr(r, "path", "") == request.url.path]
            failure.headers["Allow"] = ", ".join(sorted({m for route in routes for m in route.methods or ()}))
        request.app.state.service.metrics.note_error(failure.kind)
        return failure.response()

    return handle
