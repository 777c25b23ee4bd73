"""Real clients against a real server: `make test-clients`, in a virtual environment of the clients' own.

The server is `python -m engine.serve` with the demo model, one process for all tests. Nothing of ours is imported
here, and no process may look for any other host: that is an error, and fails the session's last test.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The environment that serves; the Makefile says where it is.
PYTHON = os.environ.get("ONELOOP_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
# Where the Makefile has put what package.json names.
NODE = Path(sys.prefix) / "node"
SCRATCH = Path(tempfile.mkdtemp(prefix="oneloop-clients-"))
GUARD = Path(__file__).with_name("guard")
# A line for each address of another machine that a process of these tests wanted.
STRANGERS = SCRATCH / "strangers"
START_BOUND_S = 300.0

pytest_plugins = ["tests.clients.matrix"]
# Only where it was asked for: HEAVY=1 of the Makefile.
collect_ignore = [] if "ONELOOP_GUIDELLM" in os.environ else ["test_guidellm.py"]

# Before any client is imported. The proxy is a port where nobody listens: what ignores the rest of this ends there.
os.environ.update(
    {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(GUARD),
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(SCRATCH / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LANGSMITH_TRACING": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LLM_USER_PATH": str(SCRATCH / "llm"),
        "ONELOOP_STRANGERS": str(STRANGERS),
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_API_KEY": "none",
    }
)
for name in ("http_proxy", "https_proxy", "no_proxy"):
    os.environ.pop(name, None)

# This process too; see guard/sitecustomize.py.
runpy.run_path(str(GUARD / "sitecustomize.py"))


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The address of the server, without /v1."""
    with serving() as found:
        yield found


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """A server of one's own; its end is part of the test."""
    command = [PYTHON, "-m", "engine.serve", "--port", "0", "--dtype", "float32", "--log-level", "warning", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(START_BOUND_S, process.kill)
        watchdog.start()
        try:
            found = _address(process)
            watchdog.cancel()
            yield found
        finally:
            watchdog.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=START_BOUND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"OpenAI-compatible API at (http://\S+)/v1", line):
            return match[1]
    raise AssertionError(f"the server ended with {process.wait()}")
