"""The implementations that `test_contract.py` runs against. A new one is one adapter and one line in ADAPTERS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.forward import Limits
from tests.cuda.support import CUDA_ADAPTERS
from tests.executor.cpu_adapter import CPUAdapter
from tests.executor.driver import Driver, ExecutorAdapter, FakeAdapter

ADAPTERS: dict[str, Callable[[], ExecutorAdapter]] = {"fake": FakeAdapter, "cpu": CPUAdapter, **CUDA_ADAPTERS}

MakeDriver = Callable[..., Driver]


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> ExecutorAdapter:
    return ADAPTERS[request.param]()


@pytest.fixture
def make_driver(adapter: ExecutorAdapter) -> Iterator[MakeDriver]:
    """Makes drivers of small executors (slots 1..4, pages 1..32 of 4 tokens) and closes them."""
    drivers: list[Driver] = []

    def make(fail_at: frozenset[int] = frozenset()) -> Driver:
        limits = Limits(
            max_num_seqs=4,
            max_num_batched_tokens=48,
            max_model_len=64,
            page_size=4,
            num_pages=32,
            vocab_size=adapter.vocab_size,
        )
        driver = Driver(adapter.make(limits, fail_at))
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.executor.close()


@pytest.fixture
def driver(make_driver: MakeDriver) -> Driver:
    return make_driver()
