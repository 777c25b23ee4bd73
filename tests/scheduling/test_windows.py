"""Pages that have left the windows of a group: when they go back, what stays for others, what is refused."""

from __future__ import annotations

import pytest

from engine.executor.fake_oracle import expected_tokens
from engine.request import ContextLengthExceededError, SamplingParams
from tests.scheduling.test_scheduler import PAGE, Rig

WINDOW = 10
# Pages that the ten tokens before a page's end touch, that page's rest, and the page being written.
TOUCHED = 5
GREEDY = SamplingParams(temperature=0.0)


def most_held(rig: Rig) -> int:
    """Run until everything is done; the most pages that were neither free nor evictable."""
    held = 0
    while rig.scheduler.has_work:
        rig.tick()
        held = max(held, rig.num_pages - rig.scheduler.kv_cache.num_available)
    return held


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_long_answer_needs_a_window_of_pages(depth: int, prefix_cache: bool) -> None:
    rig = Rig(num_pages=8, max_model_len=512, depth=depth, prefix_cache=prefix_cache, windows=(WINDOW,))
    prompt = [11, 12, 13, 14, 15]
    sequence = rig.submit(prompt, 300)
    assert most_held(rig) <= TOUCHED
    assert sequence.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 300)
    assert sequence.num_retractions == 0


@pytest.mark.parametrize("budget", [8, 64])
def test_a_prompt_longer_than_the_cache_goes_through_it(budget: int) -> None:
    rig = Rig(num_pages=TOUCHED, max_model_len=512, budget=budget, windows=(WINDOW,))
    prompt = [1 + n % 900 for n in range(200)]
    sequence = rig.submit(prompt, 20)
    most_held(rig)
    assert sequence.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 20)
    assert sequence.num_retractions == 0
    cache = rig.scheduler.kv_cache
    assert cache.num_available == TOUCHED and cache.match_length(prompt) == 0, "a prefix has a hole"
    assert cache.match_length(sequence.token_ids) > 200, "but whoever continues the answer needs its end alone"


def test_a_prompt_that_streams_leaves_others_their_pages() -> None:
    """The older ones go on, and are not retracted for it."""
    rig = Rig(num_pages=16, max_model_len=512, budget=32, windows=(WINDOW,))
    older = [rig.submit([n + 1] * 5, 60) for n in range(2)]
    rig.tick()
    prompt = [1 + n % 900 for n in range(150)]
    streamed = rig.submit(prompt, 20)
    most_held(rig)
    assert streamed.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 20)
    for n, sequence in enumerate(older):
        assert sequence.output_token_ids == expected_tokens(rig.model, [n + 1] * 5, GREEDY, 60)
        assert sequence.num_retractions == 0


def test_the_prompt_stays_in_the_tree_for_others() -> None:
    rig = Rig(num_pages=32, max_model_len=512, windows=(WINDOW,))
    prompt = list(range(1, 22))
    first = rig.submit(prompt, 100)
    while first.num_tokens < len(prompt) + WINDOW + 2 * PAGE:
        rig.tick()
    pages = first.pages
    assert pages is not None and pages.gone[0] >= len(prompt) // PAGE == pages.num_shared
    assert rig.scheduler.kv_cache.num_evictable == len(prompt) // PAGE, "unlocked, though the sequence still runs"
    second = rig.submit(prompt, 3)
    while rig.scheduler.has_work:
        rig.tick()
    assert second.num_cached_tokens == len(prompt) // PAGE * PAGE
    # Of the first one's answer the window at its end is left.
    assert rig.scheduler.kv_cache.match_length(first.token_ids) == (len(prompt) + 99) // PAGE * PAGE
    assert rig.scheduler.kv_cache.match_length(first.token_ids[:80]) == len(prompt) // PAGE * PAGE
    assert first.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 100)


def test_a_short_window_waits_for_what_is_in_flight() -> None:
    """A step that fails must find the pages that it entered, although the window has passed them already."""
    rig = Rig(num_pages=32, max_model_len=512, windows=(1,))
    prompt = list(range(1, 18))
    rig.fail_steps = set(range(100))
    failed = rig.submit(prompt, 8)
    rig.launch()
    rig.launch()
    rig.commit()
    assert failed.num_computed_tokens == 0
    while not failed.is_finished:
        rig.tick()
    rig.fail_steps = set()
    again = rig.submit(prompt, 8)
    while rig.scheduler.has_work:
        rig.tick()
    assert again.num_cached_tokens == 0, "pages of a failed step were found"
    assert again.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 8)


def test_what_can_never_fit() -> None:
    """A cache of less than a window's pages must hold the whole; one of a window's holds anything."""
    with pytest.raises(ContextLengthExceededError, match="The KV cache holds 16 tokens"):
        Rig(num_pages=TOUCHED - 1, max_model_len=512, windows=(WINDOW,)).submit([1] * 5, 100)
    rig = Rig(num_pages=TOUCHED, max_model_len=512, windows=(WINDOW,))
    assert rig.submit([1] * 5, 100).max_length == 105
    with pytest.raises(ContextLengthExceededError, match="maximum context length"):
        rig.submit([1] * 5, 510)


def test_only_groups_with_a_window_give_back() -> None:
    """One full group and two with a window: 300 tokens are 75 pages of one and a window's of each of the others."""
    rig = Rig(num_pages=100, max_model_len=512, windows=(None, WINDOW, WINDOW))
    prompt = [1 + n % 900 for n in range(200)]
    sequence = rig.submit(prompt, 100, ignore_eos=True)
    assert most_held(rig) <= 75 + 2 * TOUCHED + 2 * 64 // PAGE, "a chunk of the budget was the most beside"
    assert sequence.output_token_ids == expected_tokens(rig.model, prompt, GREEDY, 100)
    assert sequence.num_retractions == 0


def test_two_requests_share_a_prompt_that_the_window_has_left() -> None:
    rig = Rig(num_pages=200, max_model_len=512, windows=(None, WINDOW))
    system = [1 + n % 900 for n in range(200)]
    first = rig.submit([*system, 950], 60)
    while rig.scheduler.has_work:
        rig.tick()
    second = rig.submit([*system, 951, 952], 20)
    while rig.scheduler.has_work:
        rig.tick()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 200)
    assert second.output_token_ids == expected_tokens(rig.model, [*system, 951, 952], GREEDY, 20)


def test_what_fits_several_groups() -> None:
    """Alone, a sequence has a window's pages of one group, and what is left is of the other."""
    rig = Rig(num_pages=30, max_model_len=512, windows=(None, WINDOW))
    assert rig.scheduler.limits.max_cached_tokens == (30 - TOUCHED) * PAGE
    sequence = rig.submit([1] * 50, 51)
    rig.run()
    assert sequence.num_tokens == 101
    with pytest.raises(ContextLengthExceededError, match="The KV cache holds 100 tokens"):
        rig.submit([1] * 50, 52)
    assert Rig(num_pages=6, max_model_len=512, windows=(None, WINDOW)).scheduler.limits.max_cached_tokens == 3 * PAGE
