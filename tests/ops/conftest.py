"""Runs tests with the native kernels and without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from engine.ops import native


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The machine's other work would stretch a barrier; tests that want threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "torch"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of an op."""
    name: str = request.param
    if name == "native" and native.library() is None:
        pytest.skip(native.status())
    with native.disabled() if name == "torch" else contextlib.nullcontext():
        yield name


@pytest.fixture
def kernels() -> native.Library:
    """The native kernels, for tests of what only they promise."""
    library = native.library()
    if library is None:
        pytest.skip(native.status())
    return library
