"""Runs last: what the others have shown is what the README says, and no client looked for another host."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.clients import matrix
from tests.clients.conftest import STRANGERS


def test_the_readme_shows_the_matrix() -> None:
    if missing := matrix.missing():
        pytest.skip(f"only a part was run: {', '.join(map(' / '.join, missing[:3]))} ...")
    if os.environ.get("MATRIX"):
        matrix.write(matrix.table())
    assert matrix.in_readme() == matrix.table(), "make test-clients MATRIX=1 writes it"
    assert "fails" not in matrix.table()


def test_no_process_looked_for_another_host() -> None:
    assert not STRANGERS.exists(), STRANGERS.read_text()
    # And it would have been seen, here and in a process of its own.
    program = "import socket; socket.create_connection(('192.0.2.1', 80))"
    with pytest.raises(OSError, match="not this machine"):
        exec(program)
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 1
    assert STRANGERS.read_text().count("192.0.2.1") == 2
