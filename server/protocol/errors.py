"""Error bodies in OpenAI's shape: the one place where a status becomes a type and a code.

Used by the middleware, by the responder for errors inside a stream, and below aiohttp for what is no HTTP at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from aiohttp import web

from engine.request import RequestError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout",
}
# Seconds. Work is admitted every step, so a short pause is enough; clients add their own backoff.
_RETRY_AFTER = "1"


class ApiError(RequestError):
    """A RequestError whose status is a value, for what only HTTP knows about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


def error_body(error: RequestError) -> dict[str, object]:
    """The JSON object of an error."""
    status = error.status
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": error.param,
            "code": error.code or _CODES.get(status),
        }
    }


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> web.Response:
    """The HTTP answer of an error; `headers` are added to those that its status calls for."""
    response = json_response(error_body(error), error.status)
    if headers:
        response.headers.update(headers)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        response.headers["Retry-After"] = _RETRY_AFTER
    return response


def json_response(value: object, status: int = 200) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
