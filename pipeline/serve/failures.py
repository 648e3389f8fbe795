"""What clients are told when a request fails, in OpenAI's form: a status, a type, a code, a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from pipeline.core.errors import UserError
from pipeline.core.records import StopReason, Trajectory
from retriever_service.service.failures import HttpError, as_http_error, json_response

RETRY_S = 5
"""After so many seconds a server that loads may be ready."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}
"""pydantic's words for a mistake -> ours; all others are `invalid_value`."""
_OF_INFRASTRUCTURE = {
    StopReason.RETRIEVER_UNAVAILABLE: 503,
    StopReason.RETRIEVER_BAD_ANSWER: 502,
    StopReason.ACTION_UNAVAILABLE: 503,
    StopReason.ENGINE_ERROR: 503,
}


class ApiError(HttpError):
    """A request that is answered with a failure; `kind` is its code, `param` the parameter that is at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message, headers)
        self.param = param

    @property
    def type(self) -> str:
        """What kind of mistake it is, and whose."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, usual)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.kind}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def not_answered(trajectory: Trajectory) -> ApiError | None:
    """The failure of an answer that infrastructure ended; None if it was not that."""
    reason = trajectory.stop_reason
    if not reason.is_infrastructure:
        return None
    what = {
        StopReason.RETRIEVER_UNAVAILABLE: "the retriever does not answer",
        StopReason.RETRIEVER_BAD_ANSWER: "the retriever refused a query, or its answer makes no sense",
        StopReason.ACTION_UNAVAILABLE: "an action could not be done",
        StopReason.ENGINE_ERROR: "the engine failed",
    }[reason]
    return ApiError(_OF_INFRASTRUCTURE[reason], reason.value, f"{what}; the server's log says why")


def as_api_error(error: Exception) -> ApiError:
    """How a client is told of `error`. What is nobody's mistake is logged, and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, "invalid_value", str(error))
    if isinstance(error, ValidationError):
        return _of_validation(error)
    found = as_http_error(error)
    status = 400 if found.status == 422 else found.status
    return ApiError(status, found.kind, found.detail, headers=found.headers)


def as_refusal(error: HttpError) -> Response:
    """The reply to a failure that was found in front of all routes."""
    return as_api_error(error).response()


def _of_validation(error: ValidationError) -> ApiError:
    """The first mistake, by its place; what was given is left out: it may be long."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(map(str, mistake["loc"])) or None
    code = _CODES.get(mistake["type"], "invalid_value")
    message = mistake["msg"]
    if code == "unknown_parameter":
        message = "there is no such parameter"
    return ApiError(400, code, f"{param}: {message}" if param else message, param)
