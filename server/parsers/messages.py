"""Outputs that are messages, each with a header that says what it is and to whom: gpt-oss, Muse Glimmer."""

from __future__ import annotations

import re

from server.parsers.base import SPACE, Malformed, Scanner, Steps

MESSAGE = "<|message|>"
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_MAX_HEADER = 512
# What stands in headers; other words behind a mark are about something else.
_BEGUN = re.compile(r"\s*(?:\w*|(?:assistant|analysis|commentary|final|functions\.|to=).*)", re.DOTALL)


def begins_with_recipient(scanner: Scanner) -> Steps[bool]:
    """Whether the first header goes on with its recipient: the prompt has written `<|start|>assistant`."""
    scanner.begin()
    _, distance = yield from scanner.look_past(SPACE)
    if (yield from scanner.look_at(("to=",), distance)) is not None:
        return True
    scanner.settle()
    return False


def read_header(scanner: Scanner, marker: str) -> Steps[str | None]:
    """The rest of a header behind its first mark, up to the message; None where it is none, which is then content."""
    begun = scanner.ahead
    try:
        header, _ = yield from scanner.raw_until((MESSAGE,), _MAX_HEADER)
    except Malformed:
        rest = scanner.text[scanner.at - scanner.ahead + begun :]
        if scanner.closed and (scanner.cut or marker) and _BEGUN.fullmatch(rest):
            # Cut off in the middle of a header, which nobody wants to read.
            scanner.skip(len(scanner.text) - scanner.at)
            scanner.settle()
        else:
            scanner.fail()
        return None
    return marker + header
