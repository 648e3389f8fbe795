"""What clients are told when a request fails: a status, one word for programs, a sentence for people."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from retriever_service.errors import (
    RetrieverError,
    RetrieverOverloaded,
    RetrieverTimeout,
    RetrieverUnavailable,
)
from retriever_service.service.wire import ErrorReply

logger = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S = 1
_SHOWN_MISTAKES = 3

DESCRIPTIONS = {
    400: "The body is not JSON.",
    401: "The bearer token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not declared as application/json.",
    422: "The request makes no sense, or is over a limit; `detail` says what to change.",
    429: "Too many queries are waiting; come back after `Retry-After` seconds.",
    500: "A fault of the server.",
    503: "The index is being loaded, or the server is being shut down.",
    504: "Not answered before the deadline.",
}


class HttpError(Exception):
    """A request that is answered with a failure."""

    def __init__(self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return json_response(ErrorReply(error=self.kind, detail=self.detail), self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Plain data as JSON; nothing is checked or copied on the way."""
    return Response(pydantic_core.to_json(value), status, headers, "application/json")


def as_http_error(error: Exception) -> HttpError:
    """How a client is told of `error`. What is nobody's mistake is logged, and not told."""
    match error:
        case HttpError():
            return error
        case ValidationError() | RequestValidationError():
            return _validation(error.errors())
        case RetrieverError():
            return HttpError(422, "invalid_request", str(error))
        case RetrieverOverloaded():
            return HttpError(429, "overloaded", str(error), _retry_after(error.retry_after_s))
        case RetrieverUnavailable():
            return HttpError(503, "unavailable", str(error), _retry_after(UNAVAILABLE_RETRY_S))
        case RetrieverTimeout():
            return HttpError(504, "timeout", str(error))
        case HTTPException():
            kind = error.detail.lower().replace(" ", "_")
            return HttpError(error.status_code, kind, error.detail, error.headers)
    logger.error("a request failed", exc_info=error)
    return HttpError(500, "internal", "the server failed; its log says why")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Failures of a route, for its OpenAPI description."""
    return {status: {"model": ErrorReply, "description": DESCRIPTIONS[status]} for status in statuses}


def _validation(mistakes: Any) -> HttpError:
    """Names the places, and leaves out the input: it may be long."""
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return HttpError(400, "invalid_json", first["msg"])
    told = [
        f"{'.'.join(map(str, mistake['loc'])) or 'request'}: {mistake['msg']}"
        for mistake in mistakes[:_SHOWN_MISTAKES]
    ]
    if len(mistakes) > _SHOWN_MISTAKES:
        told.append(f"and {len(mistakes) - _SHOWN_MISTAKES} more")
    return HttpError(422, "invalid_request", "; ".join(told))


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
