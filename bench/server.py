"""Starts a server of ours (or any command) on a free port for a benchmark, and ends it."""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is up. exec_to_ready_s: from starting the process to the first 200 of /health."""

    port: int
    process: subprocess.Popen[bytes]
    exec_to_ready_s: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    flags: str = "", *, command: str | None = None, timeout_s: float = 300.0, ready: str = "/health"
) -> Iterator[Running]:
    """`python -m engine.serve --port P FLAGS`, or `command` with {port} in it, until the block is left.

    ready: the path that answers 200 once the server is up. Raises RuntimeError with the end of its output when it ends
    early or is not ready in time.
    """
    port = free_port()
    if command is None:
        words = [sys.executable, "-m", "engine.serve", "--port", str(port), *shlex.split(flags)]
    else:
        words = shlex.split(command.format(port=port))
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _healthy(port, ready):
                if process.poll() is not None or time.perf_counter() - begin > timeout_s:
                    log.seek(0)
                    raise RuntimeError(f"{shlex.join(words)} did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.02)
            yield Running(port, process, time.perf_counter() - begin)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
