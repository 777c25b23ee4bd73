"""Watchdog: a thread that looks whether steps still come to an end, for the loop that would know may be what hangs.
Deadline: another one, that ends a process which should have left.

Both are serve.py's. What the first sees once per stall: every thread's stack goes to the log, /health is 503 (the
Engine's own clock says that), and with the action "exit" the process ends, every stream told where the loop can still
do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

logger = logging.getLogger("oneloop.watchdog")

# For the loop to tell every stream and to end by itself, before the process ends without it.
GRACE_S = 5.0
EXIT_CODE = 70
# "Never", as timers can count it: in nanoseconds of 64 bits.
_MOST_S = 1e9
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
        _dump(self._out or sys.stderr)


class Deadline:
    """By when the process is gone, whatever is still at work in it: a long step, a template, an export.

    end: called with the exit code on the deadline's own thread. Where not even that one runs (a library that never lets
    go of Python's lock), an alarm of the kernel's ends the process GRACE_S later, with the signal's number. Any thread.
    """

    def __init__(self, *, end: Callable[[int], object] = os._exit, out: IO[str] | None = None) -> None:
        self._end = end
        self._out = out
        self._at = math.inf
        self._code = EXIT_CODE
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def within(self, seconds: float, code: int = EXIT_CODE) -> None:
        """From now on; the earliest of several counts. code: of a process that it has to end."""
        with self._changed:
            self._at, self._code = min(self._at, time.monotonic() + min(seconds, _MOST_S)), code
            if self._end is os._exit:
                if self._thread is None:
                    _exit_on_alarm()
                signal.setitimer(signal.ITIMER_REAL, max(0.0, self._at - time.monotonic()) + GRACE_S)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait, name="deadline", daemon=True)
                self._thread.start()

    def _wait(self) -> None:
        with self._changed:
            while (left := self._at - time.monotonic()) > 0.0:
                self._changed.wait(left)
            code = self._code
        at_work = ", ".join(thread.name for thread in threading.enumerate() if thread is not self._thread)
        logger.critical(
            "the time to stop is over: the process ends now (%s); the stacks of all threads follow", at_work
        )
        _dump(self._out or sys.stderr)
        self._end(code)


def _exit_on_alarm() -> None:
    """SIGALRM: the stacks, and then _exit. What the signal does by default never happens to process 1 of a container,
    and a handler of Python's own would wait for its lock."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # It is called with the signal's number, which is what it ends the process with.
    libc.signal(signal.SIGALRM, ctypes.cast(libc._exit, ctypes.c_void_p))
    with contextlib.suppress(OSError, ValueError):
        faulthandler.register(signal.SIGALRM, sys.__stderr__ or 2, all_threads=True, chain=True)


def _dump(out: IO[str]) -> None:
    try:
        out.flush()
        faulthandler.dump_traceback(out, all_threads=True)
    except (OSError, ValueError, AttributeError):
        logger.exception("the stacks could not be written")
