"""Watchdog: a thread that looks whether steps still come to an end, for the loop that would know may be what hangs.

Started by serve.py. What it sees once per stall: every thread's stack goes to the log, /health is 503 (the Engine's own
clock says that), and with the action "exit" the process ends, every stream told where the loop can still do that.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import IO

logger = logging.getLogger("oneloop.watchdog")

# For the loop to tell every stream and to end by itself, before the process ends without it.
GRACE_S = 5.0
EXIT_CODE = 70
LOOKS_PER_TIMEOUT = 4


class Watchdog:
    """idle_for: seconds without progress while there is work, 0 where there is none (any thread may ask).

    stop: called on the thread of the watchdog when the process is to end; it has GRACE_S to do so in order.
    """

    def __init__(
        self,
        idle_for: Callable[[], float],
        timeout_s: float,
        *,
        stop: Callable[[], object] | None = None,
        end: Callable[[int], object] = os._exit,
        out: IO[str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._idle_for = idle_for
        self._timeout = timeout_s
        self._stop = stop
        self._end = end
        self._out = out
        self._grace = grace_s
        self._closed = threading.Event()
        self.num_stalls = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        stalled = False
        while not self._closed.wait(self._timeout / LOOKS_PER_TIMEOUT):
            if self._idle_for() < self._timeout:
                stalled = False
            elif not stalled:
                stalled = True
                self.num_stalls += 1
                self._tell()
                if self._stop is not None:
                    self._stop()
                    if not self._closed.wait(self._grace):
                        logger.critical("the event loop does not answer: the process ends now")
                        self._end(EXIT_CODE)
                    return

    def _tell(self) -> None:
        logger.critical("no step has come to an end for %.3g seconds; the stacks of all threads follow", self._timeout)
        out = self._out or sys.stderr
        try:
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        except (OSError, ValueError, AttributeError):
            logger.exception("the stacks could not be written")
