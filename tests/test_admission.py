"""Who is refused at the door for want of time, and what they are told; rates by hand, without a clock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from engine.admission import MAX_RETRY_AFTER_S, Admission, Rate
from engine.request import OverloadedError
from engine.scheduling.residents import SchedulerCounters
from tests.server.support import live, until
from tests.server.test_errors import check_shape


def admission(**limits: float | None) -> tuple[Admission, Any]:
    scheduler: Any = SimpleNamespace(
        counters=SchedulerCounters(), num_waiting=0, num_waiting_tokens=0, num_prefilling_tokens=0
    )
    given = {"ttft_slo_s": None, "max_queue_wait_s": None, **limits}
    return Admission(scheduler, **given), scheduler


def run(one: Admission, scheduler: Any, seconds: float, *, admitted: int, computed: int) -> None:
    """Steps of 0.1 s, each with so many prompt tokens."""
    now = one._seen[0] if one._seen else 0.0
    for step in range(round(seconds * 10)):
        scheduler.counters.prefix_cache_queries += admitted
        scheduler.counters.prefill_tokens += computed
        one.observe(now + 0.1 * (step + 1))


def test_rates_forget() -> None:
    rate = Rate()
    assert rate.value is None
    for _ in range(100):
        rate.add(10, 0.1)
    assert rate.value == pytest.approx(100.0)
    for _ in range(400):
        rate.add(30, 0.1)
    assert rate.value == pytest.approx(300.0, rel=0.02)


def test_estimates_follow_what_leaves_the_queue() -> None:
    one, scheduler = admission()
    assert one.estimate(10) is None and one.retry_after() == 1.0
    run(one, scheduler, 5.0, admitted=50, computed=50)
    estimate = one.estimate(100)
    assert estimate is not None and estimate.wait == 0.0 and estimate.ttft == pytest.approx(0.2, rel=0.1)
    # A queue, and slots that let out a fifth of what could be computed.
    scheduler.num_waiting, scheduler.num_waiting_tokens = 5, 500
    run(one, scheduler, 20.0, admitted=10, computed=50)
    estimate = one.estimate(100)
    assert estimate is not None and estimate.wait == pytest.approx(5.0, rel=0.1)
    assert one.retry_after() == pytest.approx(5.0, rel=0.1)
    # Time without work is no time that it took.
    one.rest()
    one.observe(1e6)
    again = one.estimate(100)
    assert again is not None and again.wait == pytest.approx(estimate.wait)
    scheduler.num_waiting_tokens = 10**9
    assert one.retry_after() == MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("limits", "queued", "refused"),
    [
        ({}, 10_000, False),
        ({"max_queue_wait_s": 3.0}, 200, False),
        ({"max_queue_wait_s": 3.0}, 400, True),
        ({"ttft_slo_s": 3.0}, 180, False),
        ({"ttft_slo_s": 3.0}, 220, True),  # in time for its turn, and not for its first token
        ({"ttft_slo_s": 0.01}, 0, False),  # nobody is before it: it will never be faster
    ],
)
def test_who_is_refused(limits: dict[str, float], queued: int, refused: bool) -> None:
    one, scheduler = admission(**limits)
    scheduler.num_waiting = 1
    run(one, scheduler, 20.0, admitted=10, computed=10)
    scheduler.num_waiting_tokens = queued
    if not refused:
        one.check(30)
        return
    with pytest.raises(OverloadedError) as caught:
        one.check(30)
    assert caught.value.status == 429 and caught.value.retry_after is not None and caught.value.retry_after >= 1.0


async def test_the_door_says_when_to_come_back() -> None:
    async with live(max_num_seqs=1, max_queued_requests=2) as server:
        server.engine.admission._max_wait = 10.0
        for rate in (server.engine.admission.computed, server.engine.admission.admitted):
            rate.add(10, 1.0)
        server.device.gate.clear()
        body = {"prompt": [5] * 200, "max_tokens": 2}
        running = []
        for count in (1, 2):
            running.append(asyncio.create_task(server.post("/v1/completions", body)))
            await until(lambda count=count: count == server.num_requests() and server.engine.stats().num_running == 1)
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            error = check_shape(response.status, await response.json(), expected=429)
            assert error["code"] == "rate_limit_exceeded" and "overloaded" in error["message"]
            assert response.headers["Retry-After"] == "10"
        assert server.engine.metrics.rejected["overloaded"] == 1
        server.device.gate.set()
        assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
