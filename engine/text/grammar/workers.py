"""The threads that compile grammars: their stacks are deep, and one may be lost to a hopeless grammar."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from engine.text.grammar.state import Grammar

# The library recurses along references and rules. 8 MiB of stack, the usual size, end after some 500 of them, and with
# it the process; the bounds above need 60 MiB at most. Only pages that are touched count as memory.
STACK_BYTES = 512 * 1024 * 1024
POOL_THREADS = max(1, min(4, (os.cpu_count() or 2) // 2))
# Threads that may be lost to compilations that never end, before only the cache answers.
MAX_LOST_THREADS = 4


class Workers:
    """Threads with a deep stack. Daemons: one that is lost to a hopeless grammar must not hold up the exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Grammar], Callable[[], Grammar]] | None] = queue.SimpleQueue()
        self._num_threads = 0
        for _ in range(POOL_THREADS):
            self._start()

    def submit(self, job: Callable[[], Grammar]) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        self._jobs.put((future, job))
        return future

    def replace_one(self) -> None:
        """A job has run out of time; its thread may never come back."""
        if self._num_threads < POOL_THREADS + MAX_LOST_THREADS:
            self._start()

    def close(self) -> None:
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _start(self) -> None:
        self._num_threads += 1
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._work, name=f"grammar-{self._num_threads}", daemon=True).start()
        finally:
            threading.stack_size(usual)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
