"""The log's forms, and the access log: a line for each HTTP request, with the tokens of what it asked for.

`--log-format json` makes an object of every line. What comes from a client (paths, ids) is escaped, whatever the form.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.stream import TokenStream

logger = logging.getLogger("oneloop.access")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_PATH = 512
# Not told of a record: it has a place of its own, or means nothing outside of the process.
_FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """A line is an object: time (UTC), level, logger, message, error where there is one, and a record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if (fields := getattr(record, _FIELDS, None)) is not None:
            line |= {"message": "request"} | fields
        # A lone surrogate, which no JSON has, may be in a message of somebody else's.
        return orjson.dumps(_clean(line)).decode()


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value


def set_up(level: str, log_format: str) -> None:
    """The root logger's, once."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


@dataclass(slots=True)
class Usage:
    """What one HTTP request has used: the sum of its streams. ttft: seconds to the first token of all.

    trace_headers: what it says of the trace that it is part of.
    """

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    output: int = 0
    ttft: float | None = None
    trace_headers: dict[str, str] = field(default_factory=dict)

    def add(self, stream: TokenStream) -> None:
        self.requests += 1
        self.prompt += stream.num_prompt_tokens
        self.cached += stream.num_cached_tokens
        self.output += stream.num_output_tokens
        if stream.first_token_at is not None:
            ttft = stream.first_token_at - stream.arrived_at
            self.ttft = ttft if self.ttft is None else min(ttft, self.ttft)


def log_request(
    *, request_id: str, method: str, path: str, status: int, seconds: float, key: str, remote: str, usage: Usage
) -> None:
    """One line. path: without the query, which may hold anything."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "remote": remote,
        "method": method,
        "path": path[:MAX_PATH],
        "status": status,
        "seconds": round(seconds, 6),
        "key": key or None,
    }
    if usage.requests:
        fields |= {
            "sequences": usage.requests,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "output_tokens": usage.output,
            "ttft": None if usage.ttft is None else round(usage.ttft, 6),
        }
    # As one argument: the words of a client are never a format.
    text = " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value is not None)
    logger.info("%s", text, extra={_FIELDS: fields})


def _word(value: object) -> str:
    """Without a space or a line's end."""
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    escaped = value.encode("unicode_escape").decode()
    return escaped.replace(" ", "\\x20") or "-"
