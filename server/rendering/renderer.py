"""Renderer: texts to the rendering child and back, without a moment of the loop's time.

The child starts with the first text and is ended when it takes too long; the next text starts another. One thread talks
to it, so that texts wait for each other and not the loop for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Of one text; a paragraph takes a millisecond.
TIMEOUT_S = 2.0
# Of the first, which waits for imports.
START_TIMEOUT_S = 30.0
# Texts that may wait; pages send one at a time each.
MAX_WAITING = 64
_ROOT = str(Path(__file__).parent.parent.parent)


class RenderError(Exception):
    """A text that could not be rendered."""


class BusyError(Exception):
    """Too many texts wait."""


class Renderer:
    """Loop thread, but for `_call` and what it calls."""

    def __init__(self) -> None:
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="renderer")
        self._child: subprocess.Popen[bytes] | None = None
        # The first answer waits for imports.
        self._answered = False

    async def render(self, request: bytes) -> bytes:
        """The child's answer to a JSON text. Raises RenderError and BusyError."""
        if self._waiting >= MAX_WAITING:
            raise BusyError
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, request)
        finally:
            self._waiting -= 1

    def warm(self) -> None:
        """Start the child before anybody waits for it."""
        if self._child is None and not self._waiting:
            self._thread.submit(self._ready)

    def close(self) -> None:
        """End the child. What waits is left to fail."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            _end(self._child)

    def _call(self, request: bytes) -> bytes:
        child = self._ready()
        limit = TIMEOUT_S if self._answered else START_TIMEOUT_S
        assert child.stdin is not None and child.stdout is not None
        until = time.monotonic() + limit
        try:
            child.stdin.write(len(request).to_bytes(4) + request)
            child.stdin.flush()
            size = int.from_bytes(_read(child.stdout.fileno(), 4, until))
            made = _read(child.stdout.fileno(), size, until)
        except (OSError, EOFError, TimeoutError):
            self._answered = False
            self._child = None
            _end(child)
            raise RenderError from None
        self._answered = True
        if not made:
            raise RenderError
        return made

    def _ready(self) -> subprocess.Popen[bytes]:
        """A child that lives."""
        if self._child is not None and self._child.poll() is not None:
            # It crashed behind its last answer.
            _end(self._child)
            self._child, self._answered = None, False
        return self._child or self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "server.rendering.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        return self._child


def _read(source: int, size: int, until: float) -> bytes:
    """So many bytes. Raises EOFError and TimeoutError. (poll: a server may have more descriptors than select takes.)"""
    ready, parts = select.poll(), []
    ready.register(source, select.POLLIN)
    while size:
        if not ready.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(source, size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    child.wait()
