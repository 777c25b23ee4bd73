"""Keeps every Python process of the clients' tests on this machine: other addresses are an error, and written down.

Python imports a module of this name at start; conftest.py puts its folder on the path of all processes.
"""

from __future__ import annotations

import os
import sys

_HERE = (None, "", "127.0.0.1", "localhost", "::1", b"127.0.0.1", b"localhost")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in _HERE:
        with open(os.environ["ONELOOP_STRANGERS"], "a") as file:
            file.write(f"{sys.argv[:3]}: {host!r}\n")
        raise OSError(f"{host!r} is not this machine")


sys.addaudithook(_watch)
