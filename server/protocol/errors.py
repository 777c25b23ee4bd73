"""Error bodies in OpenAI's shape: the one place where a status becomes a type and a code.

A family with a shape of its own names it as ERROR_SHAPE in its endpoint module. Used by the middleware, by the
responder for errors inside a stream, and below aiohttp for what is no HTTP at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath

import orjson
from aiohttp import web

from engine.request import RequestError

# A file of the server in a sentence.
_PATH = re.compile(r"(?<![\w.])/[^\s:,;]*")
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


# Of an error and the id of the HTTP request, where it has one.
ErrorShape = Callable[[RequestError, str | None], dict[str, object]]
# Where one path speaks for two families, by its body.
OWN_SHAPE: web.RequestKey[ErrorShape] = web.RequestKey("own_shape", ErrorShape)  # type: ignore[arg-type]


class ApiError(RequestError):
    """A RequestError whose status is a value, for what only HTTP knows about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


def error_body(error: RequestError, request_id: str | None = None) -> dict[str, object]:
    """The JSON object of an error. request_id: goes into a header, not into this shape."""
    status = error.status
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": error.param,
            "code": error.code or _CODES.get(status),
        }
    }


def message_with_field(error: RequestError) -> str:
    """The message of an error for shapes that have no place of their own for the field."""
    message = str(error)
    # Most name it themselves, and the 404 of a model is the better for naming only that.
    if error.param is None or f"`{error.param}" in message or error.status == 404:
        return message
    return f"`{error.param}`: {message}"


def error_response(
    error: RequestError, headers: Mapping[str, str] | None = None, body: dict[str, object] | None = None
) -> web.Response:
    """The HTTP answer of an error; `headers` are added to those that its status calls for. body: of another shape."""
    response = json_response(error_body(error) if body is None else body, error.status)
    if headers:
        response.headers.update(headers)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        after = error.retry_after
        response.headers["Retry-After"] = _RETRY_AFTER if after is None else str(max(1, math.ceil(after)))
    return response


def json_response(value: object, status: int = 200) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def without_paths(words: str) -> str:
    """The same, with the last part alone of every file of the server that they name."""
    return _PATH.sub(lambda found: PurePath(found[0]).name or "/", words)
