"""The body of a request: bounded bytes, strict JSON, and typed access to the fields of the object.

Every reader names the field in its error. A null is an absent field, an unknown field is never looked at, and of two
fields with one name the last counts, as in every JSON parser that clients are written against.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from engine.request import Range, RequestError
from server.protocol import json_pieces
from server.protocol.errors import ApiError

T = TypeVar("T")
R = TypeVar("R")

# A body of more is parsed and checked in a thread; a hop there and back takes some 0.1 ms of the loop's time.
INLINE_BYTES = 8 * 1024
# What a compressed body may become, roughly.
_INFLATION = 8

# A router that takes this server for half of a pair would wait for the other half: in no family a hint.
REFUSED_EVERYWHERE = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
BODY_TIMEOUT_S = 60.0
# Free-form values (tools, template arguments) go through recursive code; the parser's own limit is 1024.
MAX_NESTING = 64
_NO_LIMIT = 2**63
_GZIP = (31,)
# "deflate" is zlib by the RFC, and the bare stream by some clients.
_DEFLATE = (15, -15)


Prepare = Callable[["Body"], Awaitable[None]]
# What a body may need before it can be read: see server/adapters.py.
PREPARE: web.AppKey[Prepare] = web.AppKey("prepare")


class Body:
    """One JSON object. size: its bytes, a measure of the work to come."""

    def __init__(self, values: dict[str, Any], size: int = 0) -> None:
        self._values = values
        self.size = size

    @classmethod
    def parse(cls, data: bytes) -> Body:
        """Raises RequestError unless `data` is one JSON object. A large one belongs in a thread."""
        try:
            values = json_pieces.loads(data)
        except ValueError as error:
            raise RequestError(f"The body is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise RequestError("The body must be a JSON object.")
        return cls(values, len(data))

    def raw(self, name: str) -> Any:
        """The field as it came; None where it is absent."""
        return self._values.get(name)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    @property
    def values(self) -> dict[str, Any]:
        """All fields as they came, for whoever keeps the body."""
        return self._values

    def changed(self, changes: dict[str, Any], size: int | None = None) -> Body:
        """A body with other values for some fields; a None takes one away."""
        return Body(self._values | changes, self.size if size is None else size)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(name, "must be true or false")
        return value

    def integer(self, name: str, default: T, low: int, high: int = _NO_LIMIT) -> int | T:
        """An integer from low to high. 16.0 is the integer 16, as in JSON Schema.

        Integers beyond 64 bits come from the parser as floats that have lost digits: those are no integers here.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limits = f"of at least {low}" if high == _NO_LIMIT else f"from {low} to {high}"
            raise invalid(name, f"must be an integer {limits}")
        return value

    def number(self, name: str, default: T, low: float, high: float, *, above: bool = False) -> float | T:
        """A number from low to high; `above`: low itself is excluded."""
        value = self._values.get(name)
        if value is None:
            return default
        if value not in (allowed := Range(low, high, above)):
            raise invalid(name, f"must be a number {allowed}")
        return float(value)

    def string(self, name: str, default: T, *, most: int | None = None) -> str | T:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise invalid(name, "must be a string")
        if most is not None and not 0 < len(value) <= most:
            raise invalid(name, f"must have 1 to {most} characters")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        value = self._values.get(name)
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise invalid(name, f"must be one of {', '.join(choices)}")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """A free-form object, its nesting bounded."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(name, "must be an object")
        check_nesting(name, value)
        return value

    def inner(self, name: str) -> Body:
        """The fields of an object in the body under their full names; none where it is absent."""
        return Body({f"{name}.{key}": value for key, value in (self.object(name) or {}).items()})


def invalid(name: str, what: str) -> RequestError:
    """The 400 for a field: "`name` what"."""
    return RequestError(f"`{name}` {what}.", param=name)


_IDS_AT_ONCE = 16 * 1024


def are_token_ids(value: Any, vocab_size: int) -> bool:
    """Whether this is a list of token ids of the model (an empty one too)."""
    if not isinstance(value, list):
        return False
    # A million at a time would keep all other threads waiting: they take turns between calls alone.
    parts = (value[start : start + _IDS_AT_ONCE] for start in range(0, len(value), _IDS_AT_ONCE))
    # type() and not isinstance(): a bool is no token.
    return all(set(map(type, part)) == {int} and min(part) >= 0 and max(part) < vocab_size for part in parts)


def check_nesting(name: str, value: Any) -> None:
    """Raises RequestError for a value that is nested more than MAX_NESTING deep. Breadth first, no recursion."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_NESTING):
        children: list[Any] = []
        for item in level:
            inner: Iterable[Any] = item.values() if isinstance(item, dict) else item
            children.extend(child for child in inner if isinstance(child, dict | list))
        if not children:
            return
        level = children
    raise invalid(name, f"is nested more than {MAX_NESTING} deep")


async def read_body(request: web.Request, *, any_type: bool = False, prepares: bool = True) -> Body:
    """Read, inflate and parse the JSON object that the client sends. Raises RequestError (400, 408, 413, 415).

    any_type: of families whose clients do not say that it is JSON. The gate keeps foreign pages from sending it so.
    prepares: it may be for a LoRA adapter, which is had before it is read.
    """
    if request.content_type != "application/json" and not any_type:
        raise ApiError(415, "The content type must be application/json.")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise ApiError(415, "The content encoding must be gzip, deflate or identity.")
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            data = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT_S:g} seconds.") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise RequestError("The body could not be read: its transfer encoding is broken.") from None
    if encoding != "identity":
        windows = _DEFLATE if encoding == "deflate" else _GZIP
        data = await _aside(len(data) * _INFLATION, partial(inflate, data, windows, limit))
    body = await _aside(len(data), partial(Body.parse, data))
    for name in REFUSED_EVERYWHERE:
        if body.has(name):
            raise invalid(name, "is for servers that prefill for others, or decode for them; this one does both")
    if prepares:
        await request.app[PREPARE](body)
    return body


async def aside(body: Body, work: Callable[[], R]) -> R:
    """`work()`, which reads this body and touches nothing else: in a thread where that may hold the loop for more than
    a millisecond."""
    return await _aside(body.size, work)


async def _aside(size: int, work: Callable[[], R]) -> R:
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)


def inflate(data: bytes, windows: tuple[int, ...], limit: int) -> bytes:
    """Decompress at most `limit` bytes; a bomb costs no more than that in memory or time.

    aiohttp could inflate for us, but would go on inflating what it discards after a 413.
    """
    for window in windows:
        decompressor = zlib.decompressobj(window)
        try:
            inflated = decompressor.decompress(data, limit + 1)
        except zlib.error:
            continue
        if len(inflated) > limit:
            raise _too_large(limit)
        if decompressor.eof and not decompressor.unused_data:
            return inflated
    raise RequestError("The body does not match its content encoding.")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.")
