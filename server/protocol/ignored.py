"""What a request holds and its answer does without: named by kind in a header of the response and once in the log.

Kinds come from clients, so they are cut and cleaned before they reach either. Loop thread.
"""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar

logger = logging.getLogger("oneloop.server")

HEADER = "X-Oneloop-Ignored"
_MAX_LENGTH = 64
# Of one response, and of the process: a client that makes up kinds fills neither a header nor a log.
_MAX_KINDS = 16
_MAX_LOGGED = 256
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]")


class Ignored:
    """The kinds that one request has met, in their order."""

    def __init__(self) -> None:
        self._kinds: dict[str, None] = {}

    def add(self, kind: str) -> None:
        if len(self._kinds) < _MAX_KINDS:
            self._kinds[kind] = None

    def header(self) -> str | None:
        """The value of HEADER; None where nothing was left out."""
        return ", ".join(self._kinds) or None


# Of the HTTP request that this task answers; set by the gate.
IGNORED: ContextVar[Ignored | None] = ContextVar("ignored", default=None)
_logged: set[str] = set()


def clean(kind: str) -> str:
    """A client's word for a kind of something, safe in a header, a log line and a sentence."""
    return _UNSAFE.sub("_", kind[:_MAX_LENGTH])


def ignore(where: str, kind: str = "") -> None:
    """Something was left out. where: the field that holds it, in our words; kind: the client's word for it."""
    name = f"{where}.{clean(kind)}" if kind else where
    if (ignored := IGNORED.get()) is not None:
        ignored.add(name)
    if name not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(name)
        logger.info("left out of a request, and of all that follow with it: %s", name)
