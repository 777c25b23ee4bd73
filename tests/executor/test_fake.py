"""The fake executor detects: each wrong step changes a token or trips an assertion. Also its options."""

from __future__ import annotations

import time
from random import Random

import pytest

from engine.executor.fake import TAINTED_TOKEN, FakeExecutor
from engine.executor.fake_checks import poison_staging
from engine.executor.fake_oracle import FakeModel, expected_tokens
from engine.forward import ForwardError, Limits
from engine.groups import Chunk
from engine.request import SamplingParams
from tests.executor.driver import GREEDY, Driver, decode, prefill

LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=48, max_model_len=64, page_size=4, num_pages=32, vocab_size=1000)
MODEL = FakeModel(1000)
A = [5, 6, 7, 8, 9, 10, 11]
B = [20, 21, 22]
EXPECTED = expected_tokens(MODEL, A, GREEDY, 4)


@pytest.fixture
def driver() -> Driver:
    return Driver(FakeExecutor(LIMITS))


async def prefilled(driver: Driver, pages: list[int]) -> None:
    assert await driver.run([prefill(1, A)], {1: pages}, {1: GREEDY}) == EXPECTED[:1]


def test_oracle_is_a_chain() -> None:
    for count in range(4):
        assert expected_tokens(MODEL, A + EXPECTED[:count], GREEDY, 1) == EXPECTED[count : count + 1]


def test_oracle_depends_on_order_and_every_token() -> None:
    for index in range(len(A)):
        changed = [*A]
        changed[index] += 1
        assert expected_tokens(MODEL, changed, GREEDY, 4) != EXPECTED
    assert expected_tokens(MODEL, A[::-1], GREEDY, 4) != EXPECTED


def test_oracle_depends_on_each_sampling_parameter() -> None:
    base = {"temperature": 1.0, "seed": 1}
    draws = {
        tuple(expected_tokens(MODEL, A, SamplingParams(**{**base, **change}), 4))  # type: ignore[arg-type]
        for change in ({}, {"temperature": 0.5}, {"seed": 2}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1})
    }
    assert len(draws) == 6


def test_oracle_depends_on_each_extra() -> None:
    changes = (
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((1, 1.0),)},
        {"bad_words": ((1,),)},
    )
    draws = {
        tuple(expected_tokens(MODEL, A, SamplingParams(temperature=0.0, **change), 4)) for change in ({}, *changes)
    }
    assert len(draws) == 5
    assert expected_tokens(MODEL, A, SamplingParams(temperature=0.0, logprobs=3), 4) == EXPECTED


def test_negative_seeds_are_64_bit_integers() -> None:
    params = SamplingParams(seed=-1), SamplingParams(seed=2**64 - 1)
    assert expected_tokens(MODEL, A, params[0], 4) == expected_tokens(MODEL, A, params[1], 4)


def test_eos_comes_at_its_rate() -> None:
    model = FakeModel(10**6, eos_token_id=3, eos_rate=0.25)
    tokens = expected_tokens(model, A, GREEDY, 2000)
    assert 400 < tokens.count(3) < 600


def test_stop_ids_are_masked_below_min_tokens() -> None:
    model = FakeModel(5, eos_token_id=0, eos_rate=0.5)
    params = SamplingParams(temperature=0.0, min_tokens=30, stop_token_ids=(2,))
    tokens = expected_tokens(model, A, params, 200, eos_token_ids=(0,))
    assert not {0, 2} & set(tokens[:30]) and {0, 2} <= set(tokens[30:])


async def test_a_wrong_page_is_seen(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    with pytest.raises(AssertionError, match="written for position"):
        await driver.run([decode(1, len(A))], entries=[(1, 0, 5)])


async def test_another_prompts_page_changes_the_token(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    await driver.run([prefill(2, B + B)], {2: [8, 9]}, {2: GREEDY})
    assert await driver.run([decode(1, len(A))], entries=[(1, 0, 8)]) != EXPECTED[1:2]


async def test_a_missing_page_is_seen(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    await driver.run([decode(1, 7)])
    with pytest.raises(AssertionError, match="null page"):
        await driver.run([decode(1, 8)])


async def test_a_page_given_back_is_seen_inside_the_window() -> None:
    """A has 7 tokens on pages 1 and 2; a query at 7 that sees 4 reads from position 4 on."""
    for window, fine in ((4, True), (5, False)):
        model = FakeModel(1000, windows=(window,))
        expected = expected_tokens(model, A, GREEDY, 2)
        driver = Driver(FakeExecutor(LIMITS, model))
        assert await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY}) == expected[:1]
        if fine:
            assert await driver.run([decode(1, len(A))], entries=[(1, 0, 0)]) == expected[1:]
        else:
            with pytest.raises(AssertionError, match="null page"):
                await driver.run([decode(1, len(A))], entries=[(1, 0, 0)])


def test_oracle_of_a_window_forgets() -> None:
    """Two layers see twice the window, less one; what is further back changes nothing."""
    model = FakeModel(1000, windows=(3,))
    base = expected_tokens(model, A, GREEDY, 1)
    for index in range(len(A)):
        changed = [*A]
        changed[index] += 1
        assert (expected_tokens(model, changed, GREEDY, 1) == base) == (index < len(A) - 5)


async def test_a_page_given_back_is_seen_inside_the_chunk() -> None:
    """A has 7 tokens on pages 1 and 2; a query at 7 reads from position 7 // window * window on."""
    for window, fine in ((4, True), (7, True), (5, True), (3, True), (8, False)):
        model = FakeModel(1000, windows=(Chunk(window),))
        expected = expected_tokens(model, A, GREEDY, 2)
        driver = Driver(FakeExecutor(LIMITS, model))
        assert await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY}) == expected[:1]
        if fine:
            assert await driver.run([decode(1, len(A))], entries=[(1, 0, 0)]) == expected[1:]
        else:
            with pytest.raises(AssertionError, match="null page"):
                await driver.run([decode(1, len(A))], entries=[(1, 0, 0)])


def test_oracle_of_chunks_forgets() -> None:
    """At its last token, the first of a block, A has forgotten all before it."""
    model = FakeModel(1000, windows=(Chunk(3),))
    base = expected_tokens(model, A, GREEDY, 1)
    for index in range(len(A)):
        changed = [*A]
        changed[index] += 1
        assert (expected_tokens(model, changed, GREEDY, 1) == base) == (index < len(A) - 1)


async def test_an_overwritten_page_is_seen(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    await driver.run([prefill(2, B)], {2: [1]}, {2: GREEDY})
    assert await driver.run([decode(1, len(A))]) != EXPECTED[1:2]


async def test_a_stale_relay_is_seen(driver: Driver) -> None:
    await prefilled(driver, [1, 2, 3])
    with pytest.raises(AssertionError, match="last tokens are for"):
        await driver.run([decode(1, len(A) + 1)])


async def test_an_off_by_one_start_is_seen(driver: Driver) -> None:
    with pytest.raises(AssertionError, match="written for position"):
        await driver.run([prefill(1, A, start=1)], {1: [1, 2]}, {1: GREEDY})


async def test_two_rows_writing_one_cell_are_seen(driver: Driver) -> None:
    with pytest.raises(AssertionError, match="same KV cell"):
        await driver.run([prefill(1, A), prefill(2, B)], {1: [1, 2], 2: [2]}, {1: GREEDY, 2: GREEDY})


async def test_a_table_entry_that_stands_twice_is_seen(driver: Driver) -> None:
    with pytest.raises(AssertionError, match="twice in one diff"):
        await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY}, entries=[(1, 0, 3)])


async def test_staging_refilled_too_early_is_seen(driver: Driver) -> None:
    handle = driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    driver.executor.staging[0].token_ids[2] = 77
    with pytest.raises(AssertionError, match="staging changed"):
        await driver.wait(handle)


async def test_poison_shows_leftovers(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    poison_staging(driver.executor.staging[0])
    assert await driver.run([decode(1, len(A))]) == EXPECTED[1:2]
    assert driver.executor.staging[0].row_slot[0] < 0


async def test_steps_and_sets_alternate(driver: Driver) -> None:
    await prefilled(driver, [1, 2])
    driver.step = 2
    with pytest.raises(AssertionError, match="step 2 after 0"):
        driver.launch([decode(1, len(A))])


async def test_waits_are_in_order(driver: Driver) -> None:
    driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    second = driver.launch([decode(1, len(A))])
    with pytest.raises(AssertionError, match="in order"):
        await driver.wait(second)


async def test_submit_after_close(driver: Driver) -> None:
    driver.executor.close()
    with pytest.raises(AssertionError, match="after close"):
        driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})


async def test_what_follows_a_failed_step_is_tainted() -> None:
    def fail_on(step: int) -> None:
        if step == 0:
            raise ForwardError("out of memory")

    driver = Driver(FakeExecutor(LIMITS, MODEL, fail_on=fail_on))
    failing = driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    # The same sequence goes on, a second one shares its first page and a third one shares nothing.
    following = driver.launch(
        [decode(1, len(A)), prefill(2, [30], start=4), prefill(3, B)],
        {2: [1, 5], 3: [6]},
        {2: GREEDY, 3: GREEDY},
    )
    with pytest.raises(ForwardError, match="out of memory"):
        await driver.wait(failing)
    clean = expected_tokens(MODEL, B, GREEDY, 1)
    assert await driver.wait(following) == [TAINTED_TOKEN, TAINTED_TOKEN, *clean]
    # A page that is written again is clean.
    assert await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY}) == EXPECTED[:1]


@pytest.mark.parametrize("eagerness", [0.0, 0.5, 1.0])
async def test_when_a_step_runs_changes_nothing(eagerness: float) -> None:
    driver = Driver(FakeExecutor(LIMITS, MODEL, random=Random(1), eagerness=eagerness))
    waiting = [driver.launch([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY})]
    tokens: list[int] = []
    for step in range(3):
        waiting.append(driver.launch([decode(1, len(A) + step)]))
        tokens += await driver.wait(waiting.pop(0))
    assert tokens + await driver.wait(waiting.pop()) == EXPECTED


async def test_without_compute_tokens_are_constant() -> None:
    driver = Driver(FakeExecutor(LIMITS, compute=False, constant_token=4))
    tokens = await driver.run([prefill(1, A), prefill(2, B, samples=False)], {1: [1, 2], 2: [3]})
    assert tokens == [4, -1]


async def test_step_seconds_are_waited_for_one_after_another() -> None:
    driver = Driver(FakeExecutor(LIMITS, MODEL, step_seconds=0.02))
    start = time.monotonic()
    first = driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    second = driver.launch([decode(1, len(A))])
    assert await driver.wait(first) + await driver.wait(second) == EXPECTED[:2]
    assert time.monotonic() - start >= 0.039
