"""The processes of a group beside the one that has the event loop: how they begin, and that none outlives the others.

A rank holds the reading end of a pipe whose other end only its parent has: it ends when that does, however that ends.
The parent waits for each in a thread, and is told at once of one that is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

logger = logging.getLogger("oneloop.ranks")

# Seconds that ranks have to end by themselves.
GRACE_S = 2.0


class Members:
    """Ranks 1 to size - 1, as processes. jobs: what each is told at its start, as JSON. files: that it inherits.

    on_gone(what): called once, by a thread, when one has ended that was not told to.
    """

    def __init__(self, jobs: list[dict[str, Any]], files: tuple[int, ...], on_gone: Callable[[str], None]) -> None:
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._closing = False
        self.gone: str | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        root = str(Path(__file__).parent.parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            for job in jobs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "engine.distributed.rank"],
                    stdin=subprocess.PIPE,
                    pass_fds=files,
                    env={**os.environ, "PYTHONPATH": path},
                )
                self._processes.append(process)
                assert process.stdin is not None
                process.stdin.write(orjson.dumps(job) + b"\n")
                process.stdin.flush()
        except BaseException:
            self.close()
            raise
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        with self._lock:
            if self._closing or self.gone is not None:
                return
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.gone = f"rank {rank} (process {process.pid}) {how}"
        self._on_gone(self.gone)

    def close(self) -> None:
        """End those that are left. Idempotent."""
        with self._lock:
            self._closing = True
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
