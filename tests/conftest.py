"""Of all tests: where they run in several processes at once (`make test`), torch has one thread in each.

Threads that wait for one another on cores that others use take many times as long. In the end it is told how much of
the scheduler's time was simulated.
"""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    ticks = sum(value for report in passed for name, value in report.user_properties if name == "simulated_ticks")
    if ticks:
        terminalreporter.write_line(f"{ticks:,} ticks were simulated without a violation")
