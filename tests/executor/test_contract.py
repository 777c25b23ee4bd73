"""The contract of Executor, the same for every implementation: what is in a step, and what must come of it.

Every expected token is computed by the adapter's reference, from the tokens of the context alone.
"""

from __future__ import annotations

import pytest

from engine.forward import ForwardError
from engine.request import SamplingParams
from tests.executor.conftest import MakeDriver
from tests.executor.driver import GREEDY, Driver, ExecutorAdapter, continuation, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]
B = [20, 21, 22]
SEEDED = SamplingParams(temperature=1.0, seed=7)


async def test_one_prefill_samples_the_next_token(adapter: ExecutorAdapter, driver: Driver) -> None:
    tokens = await driver.run([prefill(1, A)], {1: [3, 4]}, {1: GREEDY})
    assert tokens == continuation(adapter, A, 1)


async def test_decode_rows_read_the_relay(adapter: ExecutorAdapter, driver: Driver) -> None:
    expected = continuation(adapter, A, 4)
    assert await driver.run([prefill(2, A)], {2: [9, 1, 5]}, {2: GREEDY}) == expected[:1]
    for step in range(1, 4):
        assert await driver.run([decode(2, len(A) + step - 1)]) == expected[step : step + 1]


async def test_rows_that_do_not_sample_answer_minus_one(adapter: ExecutorAdapter, driver: Driver) -> None:
    first = await driver.run([prefill(1, A[:4], samples=False)], {1: [1, 2]}, {1: GREEDY})
    assert first == [-1]
    both = await driver.run([prefill(1, A[4:6], start=4, samples=False), prefill(2, B)], {2: [7]}, {2: GREEDY})
    assert both == [-1, *continuation(adapter, B, 1)]


async def test_a_row_that_does_not_sample_leaves_the_relay_alone(adapter: ExecutorAdapter, driver: Driver) -> None:
    expected = continuation(adapter, A, 2)
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    await driver.run([prefill(2, B, samples=False)], {2: [3]}, {2: GREEDY})
    assert await driver.run([decode(1, len(A))]) == expected[1:]


async def test_results_stand_in_the_order_of_rows(adapter: ExecutorAdapter, driver: Driver) -> None:
    tokens = await driver.run(
        [prefill(3, A), prefill(1, B), prefill(2, A[:2])],
        {3: [1, 2], 1: [3], 2: [4]},
        {1: GREEDY, 2: GREEDY, 3: GREEDY},
    )
    assert tokens == [adapter.reference_next_token(prompt, GREEDY) for prompt in (A, B, A[:2])]


async def test_chunked_prefill_is_one_prefill(adapter: ExecutorAdapter, driver: Driver) -> None:
    prompt = [(7 * i) % 50 for i in range(23)]
    expected = continuation(adapter, prompt, 2)
    start = 0
    # Chunks that end inside pages, on their edges, and one of a single token.
    for index, end in enumerate((3, 8, 9, 16, 23)):
        row = prefill(1, prompt[start:end], start, samples=end == 23)
        pages, sampling = ({1: [8, 2, 6, 4, 10, 12]}, {1: GREEDY}) if index == 0 else (None, None)
        tokens = await driver.run([row], pages, sampling)
        assert tokens == (expected[:1] if end == 23 else [-1])
        start = end
    assert await driver.run([decode(1, 23)]) == expected[1:]


async def test_mixed_batch(adapter: ExecutorAdapter, driver: Driver) -> None:
    a, b = continuation(adapter, A, 3), continuation(adapter, B, 2)
    await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY})
    tokens = await driver.run(
        [decode(1, len(A)), prefill(2, B), prefill(3, A[:5], samples=False)],
        {2: [4, 5], 3: [6, 7]},
        {2: GREEDY, 3: GREEDY},
    )
    assert tokens == [a[1], b[0], -1]
    tokens = await driver.run([decode(2, len(B)), decode(1, len(A) + 1), prefill(3, A[5:], start=5)])
    assert tokens == [b[1], a[2], a[0]]


async def test_page_table_entries_come_as_diffs(adapter: ExecutorAdapter, driver: Driver) -> None:
    prompt = [1, 2, 3]
    expected = continuation(adapter, prompt, 7)
    tokens = await driver.run([prefill(4, prompt)], {4: [31]}, {4: GREEDY})
    for position in range(3, 9):
        # A page comes with the step that first writes into it.
        entries = [(4, position // 4, 20 + position)] if position % 4 == 0 else []
        tokens += await driver.run([decode(4, position)], entries=entries)
    assert tokens == expected


async def test_a_big_table_diff_grows_the_staging(adapter: ExecutorAdapter, driver: Driver) -> None:
    staging = driver.executor.staging[0]
    capacity = len(staging.table_index)
    staging.reserve_table_diff(3 * capacity)
    assert len(staging.table_index) >= 3 * capacity and len(staging.table_page) == len(staging.table_index)
    assert await driver.run([prefill(1, A)], {1: [3, 4]}, {1: GREEDY}) == continuation(adapter, A, 1)


async def test_a_page_table_entry_may_be_remapped(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Two sequences computed one prefix at once; the later one goes on with the earlier one's page."""
    a, b = continuation(adapter, A, 2), continuation(adapter, [*A[:4], 40], 2)
    first = await driver.run([prefill(1, A), prefill(2, [*A[:4], 40])], {1: [1, 2], 2: [3, 4]}, {1: GREEDY, 2: GREEDY})
    assert first == [a[0], b[0]]
    # Page 3 goes to another sequence in the very step that remaps it.
    tokens = await driver.run(
        [decode(1, len(A)), decode(2, 5), prefill(3, B)], {3: [3]}, {3: GREEDY}, entries=[(2, 0, 1)]
    )
    assert tokens == [a[1], b[1], adapter.reference_next_token(B, GREEDY)]


async def test_shared_pages(adapter: ExecutorAdapter, driver: Driver) -> None:
    """A prefix in the pages of another sequence, computed by an earlier step."""
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    other = [*A[:4], 30, 31]
    tokens = await driver.run([prefill(2, [30, 31], start=4)], {2: [1, 5]}, {2: GREEDY})
    assert tokens == [adapter.reference_next_token(other, GREEDY)]


async def test_pages_shared_inside_one_step(adapter: ExecutorAdapter, driver: Driver) -> None:
    """All rows write their KV before any row attends, whatever the order of rows."""
    other = [*A[:4], 30]
    tokens = await driver.run(
        [prefill(2, [30], start=4), prefill(1, A)], {1: [1, 2], 2: [1, 5]}, {1: GREEDY, 2: GREEDY}
    )
    assert tokens == [adapter.reference_next_token(other, GREEDY), adapter.reference_next_token(A, GREEDY)]


async def test_sampling_rows_stay_with_their_slot(adapter: ExecutorAdapter, driver: Driver) -> None:
    hot, cold = continuation(adapter, A, 4, SEEDED), continuation(adapter, A, 4)
    first = await driver.run([prefill(1, A), prefill(2, A)], {1: [1, 2, 3], 2: [4, 5, 6]}, {2: GREEDY, 1: SEEDED})
    assert first == [hot[0], cold[0]]
    # Other rows, other order, no diffs.
    second = await driver.run([decode(2, len(A)), decode(1, len(A))])
    assert second == [cold[1], hot[1]]
    # Only slot 1 changes, and what it changes to holds from this step on.
    greedy_next = adapter.reference_next_token([*A, *hot[:2]], GREEDY)
    third = await driver.run([decode(1, len(A) + 1), decode(2, len(A) + 1)], sampling={1: GREEDY})
    assert third == [greedy_next, cold[2]]


async def test_a_draw_depends_on_seed_and_position_alone(adapter: ExecutorAdapter, make_driver: MakeDriver) -> None:
    expected = continuation(adapter, A, 3, SEEDED)
    alone, crowded = make_driver(), make_driver()
    tokens = await alone.run([prefill(1, A)], {1: [1, 2, 3]}, {1: SEEDED})
    for step in range(2):
        tokens += await alone.run([decode(1, len(A) + step)])
    assert tokens == expected
    other = SamplingParams(temperature=0.7, seed=99)
    await crowded.run([prefill(1, B)], {1: [9, 10]}, {1: other})
    tokens = (await crowded.run([decode(1, 3), prefill(4, A)], {4: [20, 21, 22]}, {4: SEEDED}))[1:]
    for step in range(2):
        tokens += (await crowded.run([decode(4, len(A) + step), decode(1, 4 + step)]))[:1]
    assert tokens == expected


async def test_stop_ids_are_masked_below_min_length(adapter: ExecutorAdapter, driver: Driver) -> None:
    unmasked = continuation(adapter, A, 1)[0]
    params = SamplingParams(temperature=0.0, stop_token_ids=(unmasked,))
    min_length = len(A) + 1
    first = await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: params}, min_length=min_length)
    assert first == [adapter.reference_next_token(A, params, min_length)] and first != [unmasked]
    second = await driver.run([decode(1, len(A))])
    assert second == [adapter.reference_next_token([*A, *first], params, min_length)]
    # A prompt as long as min_length is not masked any more.
    tokens = await driver.run([prefill(2, A)], {2: [4, 5]}, {2: params}, min_length=len(A))
    assert tokens == [unmasked]


async def test_a_slot_is_used_again(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Of the earlier sequence nothing may remain: relay, page table, sampling row."""
    await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: SEEDED})
    await driver.run([decode(1, len(A))])
    expected = continuation(adapter, B, 3)
    tokens = await driver.run([prefill(1, B)], {1: [8]}, {1: GREEDY})
    tokens += await driver.run([decode(1, 3)])
    tokens += await driver.run([decode(1, 4)], entries=[(1, 1, 2)])
    assert tokens == expected


async def test_two_steps_in_flight(adapter: ExecutorAdapter, driver: Driver) -> None:
    """The next step is launched before the last one's tokens are known, with the two sets in turn."""
    expected = continuation(adapter, A, 8)
    waiting = [driver.launch([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})]
    tokens: list[int] = []
    for step in range(7):
        waiting.append(driver.launch([decode(1, len(A) + step)]))
        tokens += await driver.wait(waiting.pop(0))
    tokens += await driver.wait(waiting.pop(0))
    assert tokens == expected


async def test_handles_know_their_step(driver: Driver) -> None:
    first = driver.launch([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    second = driver.launch([prefill(2, B)], {2: [3]}, {2: GREEDY})
    assert (first.step, second.step) == (0, 1)
    assert (await driver.executor.wait(first)).step == 0
    assert (await driver.executor.wait(second)).step == 1


async def test_an_output_lives_until_the_next_but_one_step(adapter: ExecutorAdapter, driver: Driver) -> None:
    first = driver.launch([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY})
    second = driver.launch([decode(1, len(A))])
    held = await driver.executor.wait(first)
    await driver.executor.wait(second)
    assert held.token_ids.tolist() == continuation(adapter, A, 1)


async def test_pages_and_slots_are_handed_on_in_program_order(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Step 1 still reads page 2 when step 2, which gives it to another sequence, is launched."""
    expected = continuation(adapter, A, 2)
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    reading = driver.launch([decode(1, len(A))])
    reusing = driver.launch([prefill(1, B), prefill(2, A[:3])], {1: [2], 2: [1]}, {1: GREEDY, 2: GREEDY})
    assert await driver.wait(reading) == expected[1:]
    assert await driver.wait(reusing) == [
        adapter.reference_next_token(B, GREEDY),
        adapter.reference_next_token(A[:3], GREEDY),
    ]


async def test_a_failed_step_hurts_no_other(adapter: ExecutorAdapter, make_driver: MakeDriver) -> None:
    driver = make_driver(frozenset({2}))
    expected = continuation(adapter, A, 3)
    await driver.run([prefill(1, A)], {1: [1, 2, 3]}, {1: GREEDY})
    before = driver.launch([decode(1, len(A))])
    # The failing step brings another sequence, and diffs of a third one that does not run in it.
    failing = driver.launch([prefill(2, B)], {2: [8], 3: [9]}, {2: GREEDY, 3: SEEDED})
    assert await driver.wait(before) == expected[1:2]
    after = driver.launch([decode(1, len(A) + 1), prefill(3, B)])
    with pytest.raises(ForwardError):
        await driver.wait(failing)
    assert await driver.wait(after) == [expected[2], adapter.reference_next_token(B, SEEDED)]
    # The failed sequence's slot and page serve again.
    tokens = await driver.run([prefill(2, A[:3])], {2: [8]}, {2: GREEDY})
    assert tokens == [adapter.reference_next_token(A[:3], GREEDY)]


async def test_the_first_step_may_fail(adapter: ExecutorAdapter, make_driver: MakeDriver) -> None:
    driver = make_driver(frozenset({0}))
    with pytest.raises(ForwardError):
        await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    tokens = await driver.run([prefill(1, B)], {1: [1]}, {1: GREEDY})
    assert tokens == [adapter.reference_next_token(B, GREEDY)]


async def test_every_slot_and_the_whole_budget(adapter: ExecutorAdapter, driver: Driver) -> None:
    prompts = [[(slot * 13 + 3 * i) % 60 for i in range(12)] for slot in range(1, 5)]
    tokens = await driver.run(
        [prefill(slot, prompt) for slot, prompt in enumerate(prompts, 1)],
        {slot: [slot, slot + 8, slot + 16, 28 + slot] for slot in range(1, 5)},
        dict.fromkeys(range(1, 5), GREEDY),
    )
    expected = [continuation(adapter, prompt, 2) for prompt in prompts]
    assert tokens == [pair[0] for pair in expected]
    assert await driver.run([decode(slot, 12) for slot in range(1, 5)]) == [pair[1] for pair in expected]


async def test_close_is_idempotent_and_finishes_what_is_launched(driver: Driver) -> None:
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    driver.launch([decode(1, len(A))])
    driver.executor.close()
    driver.executor.close()


async def test_close_of_an_executor_that_never_ran(make_driver: MakeDriver) -> None:
    executor = make_driver().executor
    executor.close()
    executor.close()
