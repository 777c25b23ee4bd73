"""Everything here runs as torch operations on one thread: a graph of the fake device sees no other."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator

import pytest
import torch

from engine.ops import native


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with native.disabled():
        yield
    torch.set_num_threads(before)


@atexit.register
def _quiet_end() -> None:
    """As the interpreter goes, triton's bindings list thousands of objects as leaked, behind pytest's summary."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
