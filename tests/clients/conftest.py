"""Clients that are too heavy for `make test`: collected only where they are installed (`make test-clients`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import uvloop

collect_ignore = [] if find_spec("lm_eval") is not None else ["test_lm_eval.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clients: needs lm-eval; run by `make test-clients`")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
