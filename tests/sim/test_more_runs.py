"""The second half of the seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.runs import NUM_TESTS, part


@pytest.mark.parametrize("number", range(NUM_TESTS // 2, NUM_TESTS))
def test_runs(number: int, record_property: Callable[[str, object], None]) -> None:
    record_property("simulated_ticks", part(number))
