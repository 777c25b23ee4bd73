"""KVCache with several memory groups: what a window leaves behind, who finds it, and what goes first."""

from __future__ import annotations

from random import Random

import pytest

from engine.books import check
from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.cache.kv_cache import KVCache, SequencePages
from engine.groups import MemoryGroup
from tests.cache.test_eviction import count_lines

PAGE = 2
WINDOW = 5  # sees the two pages before a page's end
FULL_AND_WINDOW = (MemoryGroup(), MemoryGroup(WINDOW))


def compute(cache: KVCache, tokens: list[int], num_computed: int | None = None, chunk: int = 4) -> SequencePages:
    """Bring a sequence to num_computed tokens in chunks, giving back on the way; what it found is not computed."""
    seq = cache.begin([*tokens, 0])
    end, last = seq.num_shared * PAGE, len(tokens) if num_computed is None else num_computed
    while end < last:
        cache.give_back(seq, end)
        end = min(last, end + chunk)
        assert cache.reserve(seq, end)
        cache.enter(seq, tokens, end)
        cache.end_step()
    cache.give_back(seq, end)
    return seq


def store(cache: KVCache, tokens: list[int]) -> None:
    cache.release(compute(cache, tokens), tokens, len(tokens))
    check(cache, [])


def found(cache: KVCache, tokens: list[int]) -> int:
    """Pages."""
    return cache.match_length([*tokens, 0]) // PAGE


def count(seq: SequencePages) -> list[int]:
    """Pages that it holds, by group."""
    return [len(pages) - gone for pages, gone in zip(seq.lists, seq.gone, strict=True)]


def test_a_window_keeps_its_pages_and_no_others() -> None:
    cache, tokens = KVCache(100, PAGE, groups=FULL_AND_WINDOW), list(range(1, 41))
    seq = compute(cache, tokens)
    # The end of page 18, from which somebody may go on, sees pages 17 and 18; page 19 is the rest.
    assert count(seq) == [20, 3] and seq.gone == [0, 17]
    assert cache.num_evictable == 17 and cache.num_free == 100 - 40
    assert found(cache, tokens) == 20, "what the sequence does not need stays as long as nobody wants it"
    cache.release(seq, tokens, len(tokens))
    assert cache.num_available == 100


def test_a_match_ends_where_a_window_is_whole() -> None:
    cache, tokens = KVCache(60, PAGE, groups=FULL_AND_WINDOW), list(range(1, 41))
    seq = compute(cache, tokens)
    assert cache.make_room(cache.num_free + 10), "ten pages that the window left behind"
    check(cache, [seq])
    # Pages 0 to 9 are a hole; an end at page 12 sees 10 and 11.
    assert [found(cache, tokens[: PAGE * n]) for n in (1, 9, 10, 11, 12, 13, 20)] == [0, 0, 0, 0, 12, 13, 20]
    other = cache.begin([*tokens[:27], 0])
    assert other.num_shared == 13 and other.gone == [0, 11]
    assert other.lists[1] == [0] * 11 + other.lists[1][11:] and all(other.lists[1][11:])
    check(cache, [seq, other])
    assert cache.num_evictable == 1 + 4, "page 10, and 13 to 16: the windows of both stay"


def test_who_computes_a_hole_again_fills_it() -> None:
    cache, tokens = KVCache(60, PAGE, groups=FULL_AND_WINDOW), list(range(1, 21))
    store(cache, tokens)
    holder = cache.begin([99])
    assert cache.reserve(holder, 0) and cache.make_room(cache.num_free + 6)
    assert found(cache, tokens[:10]) == 0 and found(cache, tokens) == 10
    full = [page for node in cache._tree.nodes() for page in node.runs[0]]
    again = compute(cache, tokens[:10])
    assert again.num_shared == 5 and again.lists[0] == full[:5], "the pages of the group that sees all are there once"
    cache.release(again, tokens[:10], 10)
    check(cache, [holder])
    assert found(cache, tokens[:10]) == 5


def test_what_was_left_behind_goes_before_what_was_used_later() -> None:
    cache = KVCache(100, PAGE, groups=FULL_AND_WINDOW)
    old, young = list(range(1, 21)), list(range(101, 121))
    store(cache, old)
    seq = compute(cache, young)
    assert cache.make_room(cache.num_free + 6)
    assert found(cache, old[:12]) == 0 and found(cache, old) == 10, "the old one's early windows went first"
    assert cache.make_room(cache.num_free + 1)
    assert found(cache, old) < 10 and found(cache, young) == 10
    assert cache.make_room(cache.num_free + 12)
    assert found(cache, old) == 0
    assert found(cache, young[:10]) == 5, "the running one's early windows are younger"
    assert cache.make_room(cache.num_free + 7) and found(cache, young[:10]) == 0
    assert not cache.make_room(cache.num_free + 1), "all that is left is in use"
    check(cache, [seq])


def test_a_failed_step_takes_back_every_group() -> None:
    cache, tokens = KVCache(100, PAGE, groups=FULL_AND_WINDOW), list(range(1, 31))
    failed = compute(cache, tokens)
    reader = cache.begin([*tokens, 0])
    cache.take_back(failed, 4)
    check(cache, [failed, reader])
    assert not cache.is_intact(failed) and not cache.is_intact(reader)
    assert found(cache, tokens) == 4
    for seq in (failed, reader):
        cache.release(seq, tokens, 0)
    check(cache, [])
    assert cache.num_free == 100 - 8 and cache.num_evictable == 8


def test_where_all_layers_have_windows_nothing_stays_for_nothing() -> None:
    """Nodes whose pages are all gone live while somebody stands on them."""
    groups = (MemoryGroup(WINDOW), MemoryGroup(3))
    cache, tokens = KVCache(100, PAGE, groups=groups), list(range(1, 31))
    seq = compute(cache, tokens)
    cache.flush()
    check(cache, [seq])
    assert found(cache, tokens) == 15 and found(cache, tokens[:20]) == 0
    cache.release(seq, tokens, 30)
    check(cache, [])
    cache.flush()
    assert cache.num_free == 100 and not list(cache._tree.nodes()) and not cache._tree.roots()


def test_num_missing_is_what_a_sequence_holds_at_once() -> None:
    cache = KVCache(100, PAGE, groups=FULL_AND_WINDOW)
    seq = cache.begin([1] * 50)
    assert cache.num_missing(seq, 6) == 3 + 3
    assert cache.num_missing(seq, 50) == 25 + 4
    assert cache.num_missing(seq, 50, ahead=8) == 25 + 8
    assert cache.reserve(seq, 50, 6)
    assert count(seq) == [25, 3] and cache.num_missing(seq, 50) == 1


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
@pytest.mark.parametrize("seed", range(4))
def test_at_random(policy: str, seed: int) -> None:
    """Whatever happens, `check` agrees, and a match is where the tree has what every window sees."""
    random = Random(f"{policy} {seed}")
    windows = random.choice([(None, 5), (None, 3, 3, 9), (4, 9), (1, None)])
    groups = tuple(MemoryGroup(window) for window in windows)
    cache = KVCache(random.randint(60, 90), PAGE, groups=groups, eviction_policy=policy)
    live: list[tuple[SequencePages, list[int]]] = []
    for _ in range(250):
        tokens = [random.choice([1, 1, 1, 2]) for _ in range(random.randint(1, 24))]
        action = random.random()
        if action < 0.4 and cache.num_available > 30 * len(groups):
            live.append((compute(cache, tokens, chunk=random.randint(1, 9)), tokens))
        elif action < 0.5 and live:
            cache.take_back(random.choice(live)[0], random.randint(0, 12))
            for seq, its in [entry for entry in live if not cache.is_intact(entry[0])]:
                live.remove((seq, its))
                cache.release(seq, its, len(its))
        elif action < 0.6:
            cache.make_room(random.randint(0, cache.num_available))
        elif live:
            seq, its = live.pop(random.randrange(len(live)))
            cache.release(seq, its, len(its))
        check(cache, [seq for seq, _ in live])
        assert found(cache, tokens) == best_match(cache, tokens), tokens


def best_match(cache: KVCache, tokens: list[int]) -> int:
    """By trying every end."""
    runs: list[list[int]] = [[] for _ in cache.groups]
    nodes, data = cache._tree.roots()[:1], list(tokens)
    while nodes:
        node = nodes.pop()
        own = memoryview(node.tokens).cast("i").tolist()[: node.length * PAGE] if node.parent else []
        pages = 0
        while pages < node.length and own[pages * PAGE : (pages + 1) * PAGE] == data[: (pages + 1) * PAGE][-PAGE:]:
            if len(data) < (pages + 1) * PAGE:
                break
            pages += 1
        for pages_of, run in zip(runs, node.runs, strict=True):
            pages_of += run[:pages]
        if pages == node.length:
            data = data[pages * PAGE :]
            nodes = [child for key, child in node.children.items() if memoryview(key).cast("i").tolist() == data[:PAGE]]
    for end in range(len(runs[0]), 0, -1):
        if all(all(run[group.behind(end * PAGE, PAGE) : end]) for group, run in zip(cache.groups, runs, strict=True)):
            return end
    return 0


def test_a_page_that_was_left_behind_costs_the_same_in_a_large_tree() -> None:
    costs = []
    for num_prompts in (20, 500):
        cache = KVCache(num_prompts * 20, PAGE, groups=FULL_AND_WINDOW)
        for i in range(num_prompts):
            prompt = [i + 1] * (10 * PAGE)
            cache.release(compute(cache, prompt, chunk=20), prompt, len(prompt))
        costs.append(count_lines(cache, 16))
        assert cache.num_evicted_pages >= 16
    assert costs[1] <= costs[0] + 2
