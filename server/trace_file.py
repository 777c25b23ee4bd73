"""--trace-file: a trace of the whole run, written as it goes; and the same in memory for GET /trace.

A thread makes the events of a second at a time and writes them. The file is a JSON array that a clean end closes; the
viewers also take one that a kill left open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import IO

import orjson

from engine.config import StartupError
from engine.recorder import Recorder, Tracer, now
from server.trace_events import Json, TraceEvents

logger = logging.getLogger("oneloop.server")

MAX_FILE_BYTES = 2 * 1024**3
_EVERY_S = 1.0
# Events that are written at once: a tenth of a millisecond.
PART = 256


def check(path: str) -> None:
    """Raises StartupError for a path that cannot be written."""
    _open(path, "ab").close()


def _open(path: str, mode: str) -> IO[bytes]:
    try:
        file: IO[bytes] = open(path, mode)  # noqa: SIM115  (its owner closes it)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StartupError(f"--trace-file: {path!r} cannot be written: {why}") from None
    return file


class TraceFile:
    """Raises StartupError for a path that cannot be written. `running`: while the server serves."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = _open(path, "wb")  # closed by `running`
        self._size = 0
        self._failed = False

    @contextlib.asynccontextmanager
    async def running(self, recorder: Recorder) -> AsyncIterator[None]:
        tracer = Tracer()
        events = TraceEvents(tracer.began)
        self._write(b"[\n" + orjson_lines(events.head()))
        stop = asyncio.Event()
        recorder.start(tracer)
        task = asyncio.create_task(self._write_on(tracer, events, stop))
        try:
            yield
        finally:
            stop.set()
            await task
            recorder.stop(tracer)
            self._write(orjson_lines([*events.take(tracer), *events.tail(now())]))
            self._close()

    async def _write_on(self, tracer: Tracer, events: TraceEvents, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _EVERY_S)
            await asyncio.to_thread(lambda: self._write(orjson_lines(events.take(tracer))))

    def _write(self, data: bytes) -> None:
        if self._failed or not data:
            return
        if self._size + len(data) > MAX_FILE_BYTES:
            logger.warning("--trace-file: %s has %d bytes and gets no more", self.path, self._size)
            self._failed = True
            return
        try:
            self._size += self._file.write(data)
            self._file.flush()
        except OSError as error:
            logger.warning("--trace-file: %s: %s; it gets no more", self.path, error.strerror)
            self._failed = True

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            if not self._failed and self._size:
                self._file.seek(-2, 1)  # the comma before the end
                self._file.truncate()
                self._file.write(b"\n]\n")
            self._file.close()


def orjson_lines(events: list[Json]) -> bytes:
    """With a comma behind each, and a line's end behind each part: nobody else runs while one is written."""
    parts = (events[at : at + PART] for at in range(0, len(events), PART))
    return b"".join([orjson.dumps(part)[1:-1] + b",\n" for part in parts])
