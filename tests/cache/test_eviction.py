"""Eviction policies: the order of each, and that an evicted page costs the same in a small tree and a large one."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from engine.books import check
from engine.cache.eviction.lfu import MAX_HITS
from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.cache.kv_cache import KVCache, SequencePages

PAGE_SIZE = 2


def tokens(text: str) -> list[int]:
    """One letter is one page; one more token, so that begin() may match all of it."""
    return [ord(letter) for letter in text for _ in range(PAGE_SIZE)] + [0]


def store(cache: KVCache, text: str) -> None:
    seq = hold(cache, text)
    cache.release(seq, tokens(text), len(text) * PAGE_SIZE)
    cache.end_step()


def hold(cache: KVCache, text: str) -> SequencePages:
    seq = cache.begin(tokens(text))
    assert cache.reserve(seq, len(text) * PAGE_SIZE)
    cache.enter(seq, tokens(text), len(text) * PAGE_SIZE)
    return seq


def eviction_order(cache: KVCache, texts: list[str]) -> str:
    """The last letters of the given prompts in the order in which their last pages go."""
    gone, known = "", list(texts)
    while known:
        check(cache, [])
        assert cache.make_room(cache.num_free + 1)
        lost = [text for text in known if cache.match_length(tokens(text)) < len(text) * PAGE_SIZE]
        assert lost, "nothing went"
        known = [text for text in known if text not in lost]
        gone += "".join(sorted(text[-1] for text in lost))
    return gone


def filled(policy: str) -> KVCache:
    """Entered in the order a, ab, abc, x, y; then used: y, ab twice, x."""
    cache = KVCache(32, PAGE_SIZE, eviction_policy=policy)
    for text in ("a", "ab", "abc", "x", "y"):
        store(cache, text)
    for text in ("y", "ab", "ab", "x"):
        cache.release(cache.begin(tokens(text)), tokens(text), 0)
    return cache


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", "cybax"),  # c was not used again; b and a last with ab, x after them
        ("lfu", "cyxba"),  # c 1 hit, y and x 2, b 4, a 5
        ("fifo", "cbaxy"),  # a leaf goes before the older page it stands on, which then is the oldest
    ],
)
def test_order(policy: str, order: str) -> None:
    assert eviction_order(filled(policy), ["a", "ab", "abc", "x", "y"]) == order


@pytest.mark.parametrize(("policy", "order"), [("lru", "xcba"), ("lfu", "cbax"), ("fifo", "cbax")])
def test_a_lock_keeps_its_place_or_gains_one(policy: str, order: str) -> None:
    cache = KVCache(32, PAGE_SIZE, eviction_policy=policy)
    store(cache, "abc")
    held = cache.begin(tokens("ab"))
    store(cache, "x")
    cache.release(cache.begin(tokens("x")), tokens("x"), 0)
    extended = cache.begin(tokens("abc"))
    cache.release(held, tokens("ab"), 0)
    cache.release(extended, tokens("abc"), 0)
    if policy == "lfu":  # c has 2 hits, b and a 3, x 3 and younger
        cache.release(cache.begin(tokens("x")), tokens("x"), 0)
    assert eviction_order(cache, ["a", "ab", "abc", "x"]) == order


def test_lfu_use_counts_more_than_time() -> None:
    cache = KVCache(32, PAGE_SIZE, eviction_policy="lfu")
    for text in ["x"] * 9 + ["abc"] * 8 + ["y"] * 7:
        store(cache, text)
    assert eviction_order(cache, ["a", "ab", "abc", "x", "y"]) == "ycbax"


def test_lfu_a_split_keeps_the_hits() -> None:
    cache = KVCache(32, PAGE_SIZE, eviction_policy="lfu")
    for text in ("abc", "abc", "abc", "x", "x", "x", "x", "ab"):  # c 3 hits, x 4, b and a 4 and younger
        store(cache, text)
    assert eviction_order(cache, ["a", "ab", "abc", "x"]) == "cxba"


def test_fifo_a_split_keeps_the_time_of_entry() -> None:
    cache = KVCache(32, PAGE_SIZE, eviction_policy="fifo")
    store(cache, "x")
    store(cache, "abc")
    held = cache.begin(tokens("x"))
    store(cache, "ab")
    assert cache.make_room(cache.num_free + 1)  # c goes, and leaves b as a leaf
    cache.release(held, tokens("x"), 0)
    assert eviction_order(cache, ["a", "ab", "x"]) == "xba"


def test_lfu_counts_no_further_than_its_bound() -> None:
    cache = KVCache(32, PAGE_SIZE, eviction_policy="lfu")
    for text in ("x", "ab"):
        store(cache, text)
        for _ in range(MAX_HITS + 20):
            cache.release(cache.begin(tokens(text)), tokens(text), 0)
    cache.release(cache.begin(tokens("x")), tokens("x"), 0)
    store(cache, "y")
    assert eviction_order(cache, ["x", "a", "ab", "y"]) == "ybax"


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
def test_hot_prompts_leave_nothing_behind(policy: str) -> None:
    """A policy keeps nothing per use: a million uses of one prompt are a million nothings."""
    cache = KVCache(8, PAGE_SIZE, eviction_policy=policy)
    store(cache, "a")
    store(cache, "b")
    policy_state = vars(cache._tree.policy)
    sizes = []
    for _ in range(3):
        for _ in range(300):
            cache.release(cache.begin(tokens("b")), tokens("b"), 0)
        sizes.append([len(value) for value in policy_state.values() if hasattr(value, "__len__")])
    assert sizes[1] == sizes[2]


def count_lines(cache: KVCache, pages: int) -> int:
    """Python lines that evicting `pages`, one by one, runs through."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(pages):
            cache.make_room(cache.num_free + 1)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
@pytest.mark.parametrize("run", [1, 8])
def test_cost_per_page_does_not_grow(policy: str, run: int) -> None:
    costs = []
    for num_prompts in (20, 1_000):
        cache = KVCache(num_prompts * run, PAGE_SIZE, eviction_policy=policy)
        for i in range(num_prompts):
            prompt = [i] * (run * PAGE_SIZE) + [0]
            seq = cache.begin(prompt)
            assert cache.reserve(seq, run * PAGE_SIZE)
            cache.release(seq, prompt, run * PAGE_SIZE)
        costs.append(count_lines(cache, 16))
        assert cache.num_evicted_pages == 16
    assert costs[1] <= costs[0] + 2
