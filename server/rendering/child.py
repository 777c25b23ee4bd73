"""The process that renders: length and JSON in, length and JSON out, one after another, until its input ends.

A process and not a thread, because a regular expression or a parser keeps the interpreter for itself for as long as it
runs, and because what hangs or crashes on a hostile text can be ended.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import orjson

from server.rendering.markdown import State, render

# Bytes. Far above what any text within the limits takes.
_MEMORY = 1 << 30


def answer(request: bytes) -> bytes:
    """The body of /web/api/render's answer for its body as JSON."""
    asked = orjson.loads(request)
    blocks, state = render(asked["text"], State(**asked["state"]), final=asked["final"])
    return orjson.dumps({"blocks": blocks, "state": state})


def main() -> None:
    # Ctrl-C in a terminal is meant for the server, which closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(4)) == 4:
        try:
            made = answer(source.read(int.from_bytes(head)))
        except Exception:
            # Whatever a text does to a parser is its own affair; the server says so to who sent it.
            made = b""
        sink.write(len(made).to_bytes(4) + made)
        sink.flush()


if __name__ == "__main__":
    main()
