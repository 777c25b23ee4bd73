"""Rows that ask for a vector, for every executor: beside decode rows, in chunks, in a slot that others had."""

from __future__ import annotations

import numpy as np
import pytest

from engine.executor.base import StepHandle
from engine.forward import ForwardError, PooledRow
from engine.request import Pooling
from tests.executor.conftest import MakeDriver
from tests.executor.driver import GREEDY, Driver, ExecutorAdapter, continuation, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]
B = [20, 21, 22]
LONG = [(7 * i) % 50 for i in range(23)]
LAST, MEAN, LOGPROBS = Pooling("last"), Pooling("mean"), Pooling("logprobs", (17, 3, 40))
KINDS = [LAST, MEAN, LOGPROBS]


async def vectors(driver: Driver, handle: StepHandle) -> list[list[float]]:
    output = await driver.executor.wait(handle)
    assert all(vector.dtype == np.float32 for vector in output.pooled)
    return [vector.tolist() for vector in output.pooled]


def check(adapter: ExecutorAdapter, vector: list[float], prompt: list[int], pooling: Pooling) -> None:
    expected = np.array(adapter.reference_vector(prompt, pooling))
    assert len(vector) == len(expected)
    assert np.abs(np.array(vector) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_references_differ(adapter: ExecutorAdapter) -> None:
    """Else the tests below would prove little."""
    for pooling in KINDS:
        one, other = (adapter.reference_vector(prompt, pooling) for prompt in (A, [*A[:3], 33, *A[4:]]))
        assert not np.allclose(one, other, rtol=1e-3)
    assert not np.allclose(adapter.reference_vector(A, LAST), adapter.reference_vector(A, MEAN), rtol=1e-3)


async def test_vectors_stand_in_the_order_of_rows(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Beside a decode row and a prompt that goes on to sample, whose tokens are what they would be alone."""
    expected = continuation(adapter, A, 3)
    assert await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY}) == expected[:1]
    rows = [decode(1, len(A)), prefill(2, B, samples=False), prefill(3, B), prefill(4, LONG, samples=False)]
    handle = driver.launch(
        rows,
        {2: [4], 3: [5], 4: [6, 7, 8, 9, 10, 11]},
        {2: GREEDY, 3: GREEDY, 4: GREEDY},
        pooled=[PooledRow(1, MEAN, True), PooledRow(3, LAST, True)],
    )
    output = await driver.executor.wait(handle)
    assert output.token_ids.tolist() == [expected[1], -1, continuation(adapter, B, 1)[0], -1]
    check(adapter, output.pooled[0].tolist(), B, MEAN)
    check(adapter, output.pooled[1].tolist(), LONG, LAST)
    # The relay of others is untouched.
    assert await driver.run([decode(1, len(A) + 1)]) == expected[2:]


@pytest.mark.parametrize("pooling", KINDS, ids=lambda pooling: pooling.kind)
async def test_chunks_make_no_difference(adapter: ExecutorAdapter, driver: Driver, pooling: Pooling) -> None:
    """Of two prompts at once, two steps in flight."""
    other = LONG[::-1]
    waiting: list[StepHandle] = []
    found: list[list[float]] = []
    start = 0
    for index, end in enumerate((3, 8, 9, 16, 23)):
        ends = end == 23
        rows = [prefill(slot, text[start:end], start, samples=False) for slot, text in ((1, LONG), (2, other))]
        pages = {1: [8, 2, 6, 4, 10, 12], 2: [1, 3, 5, 7, 9, 11]} if index == 0 else None
        sampling = {1: GREEDY, 2: GREEDY} if index == 0 else None
        pooled = [PooledRow(row, pooling, ends) for row in (0, 1)] if ends or pooling is MEAN else []
        waiting.append(driver.launch(rows, pages, sampling, pooled=pooled))
        if len(waiting) == 2:
            found += await vectors(driver, waiting.pop(0))
        start = end
    assert found == []
    found = await vectors(driver, waiting.pop())
    check(adapter, found[0], LONG, pooling)
    check(adapter, found[1], other, pooling)


async def test_last_goes_on_from_shared_pages(adapter: ExecutorAdapter, driver: Driver) -> None:
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    rows = [prefill(2, [30, 31], start=4, samples=False), prefill(3, [32], start=4, samples=False)]
    handle = driver.launch(
        rows,
        {2: [1, 5], 3: [1, 6]},
        {2: GREEDY, 3: GREEDY},
        pooled=[PooledRow(0, LAST, True), PooledRow(1, LOGPROBS, True)],
    )
    found = await vectors(driver, handle)
    check(adapter, found[0], [*A[:4], 30, 31], LAST)
    check(adapter, found[1], [*A[:4], 32], LOGPROBS)


async def test_a_mean_begins_anew_with_its_slot(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Its last sequence went away half computed."""
    row = prefill(1, LONG[:8], samples=False)
    await driver.wait(driver.launch([row], {1: [1, 2]}, {1: GREEDY}, pooled=[PooledRow(0, MEAN, False)]))
    handle = driver.launch([prefill(1, A, samples=False)], {1: [3, 4]}, {1: GREEDY}, pooled=[PooledRow(0, MEAN, True)])
    check(adapter, (await vectors(driver, handle))[0], A, MEAN)
    # And a slot that gave a vector samples for its next sequence.
    assert await driver.run([prefill(1, B)], {1: [5]}, {1: GREEDY}) == continuation(adapter, B, 1)


async def test_a_failed_chunk_hurts_no_other_row(adapter: ExecutorAdapter, make_driver: MakeDriver) -> None:
    driver = make_driver(frozenset({0}))
    first = prefill(1, LONG[:8], samples=False)
    failing = driver.launch([first], {1: [1, 2, 3]}, {1: GREEDY}, pooled=[PooledRow(0, MEAN, False)])
    rows = [prefill(1, LONG[8:10], 8, samples=False), prefill(2, B, samples=False)]
    following = driver.launch(rows, {2: [4]}, {2: GREEDY}, pooled=[PooledRow(0, MEAN, True), PooledRow(1, MEAN, True)])
    with pytest.raises(ForwardError):
        await driver.wait(failing)
    found = await vectors(driver, following)
    assert np.isnan(found[0]).all(), "the vector of a failed prompt must not look like one"
    check(adapter, found[1], B, MEAN)
