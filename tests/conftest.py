"""Of all tests: where they run in several processes at once (`make test`), torch has one thread in each.

Threads that wait for one another on cores that others use take many times as long. In the end it is told how much of
the scheduler's time was simulated.

What thousands of tests and their modules hold stays until the end: the garbage collector, which an executor calls as it
starts, need not go through all of it each time. That took longer than many a test.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)


# Files of a minute and more, the longest first: begun last, one would keep a process while the other has no more to do.
LONG = [
    *("sim/test_runs.py", "sim/test_more_runs.py", "cuda/test_compile.py", "cuda/test_dry_run.py"),
    *("sim/test_mutants.py", "cuda/test_host_tier.py", "cuda/test_gpu_run.py", "test_windows.py"),
    *("cuda/test_triton.py", "sim/test_simulation.py"),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {config.rootpath / "tests" / path: number for number, path in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Between two files, when the fixtures of the one are gone and those of the other are not there yet."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    ticks = sum(value for report in passed for name, value in report.user_properties if name == "simulated_ticks")
    if ticks:
        terminalreporter.write_line(f"{ticks:,} ticks were simulated without a violation")
