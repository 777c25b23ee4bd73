"""Pace: whose turn it is, and how the interval follows the loop's load. LoopWatch: what it sees of a real loop."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time

import numpy as np
import pytest

from engine import pace as pace_module
from engine.metrics import EngineMetrics
from engine.pace import BUSY, IDLE, LONG_LAG_S, LOOK_S, MOST_WAIT_S, LoopWatch, Pace


def steps(pace: Pace, rows: int, count: int, gap: float) -> np.ndarray:
    """Flushes as a publisher would. bool [count, rows]: who had a turn; all have had their first token."""
    flushed_at, listened = np.zeros(rows), np.ones(rows, np.bool_)
    turns = np.zeros((count, rows), np.bool_)
    for step in range(count):
        now = gap * (step + 1)
        turns[step] = pace.due(flushed_at, listened, gap, now)
        flushed_at[turns[step]] = now
    return turns


def test_an_idle_loop_sends_every_token_at_once() -> None:
    assert steps(Pace(), 7, 5, 0.01).all()


def test_an_interval_that_was_given_stays() -> None:
    pace = Pace(0.035)
    for utilisation in (1.0, 0.0):
        for _ in range(50):
            pace.follow(utilisation, LOOK_S)
        assert pace.interval == 0.035
    turns = steps(pace, 3, 16, 0.01)
    # All of them together, every fourth step.
    assert turns.all(axis=1).tolist() == 4 * [False, False, False, True]
    assert turns.any(axis=1).tolist() == turns.all(axis=1).tolist()


@pytest.mark.parametrize(("rows", "interval"), [(64, 0.05), (10, 0.025), (3, 0.07), (1, 0.04), (2, 0.1)])
def test_all_streams_wait_alike_and_writes_are_spread(rows: int, interval: float) -> None:
    pace = Pace()
    pace.interval = interval
    turns = steps(pace, rows, 400, 0.01)
    counts = turns.sum(axis=0)
    assert counts.max() - counts.min() <= 2, "nobody has more turns than others"
    assert counts.mean() == pytest.approx(400 * 0.01 / interval, rel=0.05), "as often as the interval says"
    assert np.ptp(turns[40:].sum(axis=1)) <= 1, "every step as many as any other"
    waits = [np.diff(np.flatnonzero(turns[:, row])).max() for row in range(rows)]
    assert max(waits) * 0.01 <= 2 * interval + 0.01


def test_rows_of_a_rare_step_and_rows_that_nobody_reads() -> None:
    pace = Pace()
    pace.interval = 0.05
    flushed_at = np.array([-math.inf, 0.99, 0.5, math.inf, 0.97])
    due = pace.due(flushed_at, flushed_at < math.inf, 0.001, 1.0)
    assert due.tolist() == [True, False, True, False, False]


def test_the_interval_follows_the_load_within_its_bounds() -> None:
    pace = Pace()

    def look(utilisation: float, gap: float) -> float:
        pace._num_steps = round(LOOK_S / gap)
        pace.follow(utilisation, LOOK_S)
        return pace.interval

    assert look(BUSY, 0.01) == 0.0
    first = look(0.9, 0.01)
    assert first == pytest.approx(0.015), "from the steps' own gap on"
    assert look((BUSY + IDLE) / 2, 0.01) == first, "no change between the bounds"
    grown = [look(1.0, 0.01) for _ in range(20)]
    assert grown == sorted(grown) and grown[-1] == MOST_WAIT_S
    shrunk = [look(0.1, 0.01) for _ in range(40)]
    assert shrunk == sorted(shrunk, reverse=True) and shrunk[-1] == 0.0
    assert min(interval for interval in shrunk if interval) > 0.01, "below the steps' gap it means nothing"


@pytest.mark.parametrize("busy", [False, True])
async def test_a_loop_that_is_held_is_seen(
    busy: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """busy: others had the processor most of the time, which is no fault of the server's."""
    monkeypatch.setattr(pace_module, "waited", lambda: 0.9 * time.monotonic() if busy else 0.0)
    metrics, pace = EngineMetrics(model_name="tiny"), Pace()
    watch = LoopWatch(metrics, pace)
    watch.start()
    with caplog.at_level(logging.WARNING, logger="oneloop.engine"):
        await asyncio.sleep(0)
        end = time.monotonic() + LOOK_S + 2 * LONG_LAG_S
        while time.monotonic() < end:
            pass
        while not metrics.loop_lag.counts.sum():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.01)
    watch.stop()
    [line] = [record.getMessage() for record in caplog.records]
    end_of_line = r" \(the processors were busy: \d+ ms in the queue for one\)" if busy else ""
    assert re.fullmatch(rf"the event loop was \d+ ms late{end_of_line}", line)
    assert metrics.loop_lag.sums[0] >= LONG_LAG_S
    assert 0.0 < metrics.loop_utilisation <= 1.0
    seen = metrics.loop_lag.counts.sum()
    await asyncio.sleep(2 * LOOK_S)
    assert metrics.loop_lag.counts.sum() == seen, "it looks no more once it is stopped"
