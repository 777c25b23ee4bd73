"""A worker of Dynamo without Dynamo. With it: tests/scale/workers."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What an environment without Dynamo, or with its runtime alone, finds.
START = (
    "import runpy, sys; sys.modules[{missing!r}] = None; "
    "runpy.run_module('engine.integrations.dynamo', run_name='__main__')"
)


@pytest.mark.parametrize("missing", ["dynamo", "dynamo.common"])
def test_what_is_missing_is_said_in_a_line(missing: str) -> None:
    command = [sys.executable, "-c", START.format(missing=missing)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and not ended.stdout
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: ") and "pip install --no-deps ai-dynamo" in line
