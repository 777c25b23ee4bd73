"""The server's tests run on uvloop, as the server does, over real sockets on 127.0.0.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import uvloop

from engine.text import infill
from tests.server.support import Live, live


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Live]:
    async with live() as server:
        yield server


@pytest.fixture
def infills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model as one that can fill in the middle: three of its tokens are marks for it."""
    monkeypatch.setattr(infill, "_PREFIXES", ("<tool_call>",))
    monkeypatch.setattr(infill, "_SUFFIXES", ("</tool_call>",))
    monkeypatch.setattr(infill, "_MIDDLES", ("<|im_start|>",))
