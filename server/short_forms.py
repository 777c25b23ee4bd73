"""Short forms of paths: clients whose base URL lacks the /v1 find what they look for all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LONG = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/models",
)


def short_form(path: str) -> str | None:
    """The path without its /v1, where it has such a form."""
    return path.removeprefix("/v1") if path.startswith(_LONG) else None


def with_short_forms(routes: Sequence[tuple[str, str, Any]]) -> tuple[tuple[str, str, Any], ...]:
    """Routes, each under its short form as well."""
    short = ((method, short_form(path), handler) for method, path, handler in routes)
    return (*routes, *((method, path, handler) for method, path, handler in short if path is not None))
