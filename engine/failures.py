"""Whose error an exception is: one request's, or the process'. A word at the root."""

from __future__ import annotations

import asyncio

# What ends more than a request, whoever's code it comes through. All else that a request's own code raises is that
# request's error, and `except Exception` is not enough for it: a panic in a library that is written in Rust (grammars,
# tokenizers) comes as a BaseException.
_FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


def raise_fatal(error: BaseException) -> None:
    """Called first of all in an `except BaseException`: raises what is not one request's error."""
    if isinstance(error, _FATAL):
        try:
            raise error
        finally:
            # Its traceback names this frame: a circle, in which all that it passes would stay.
            del error
