"""KVCache against a model that knows single pages and no tree, for every policy; and its edges one by one."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.books import check
from engine.cache.eviction.lfu import MAX_HITS
from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.cache.kv_cache import KVCache, SequencePages

Prefix = tuple[str, tuple[int, ...]]  # namespace, tokens of whole pages


class SharedPage:
    """What the model knows of a page in the tree."""

    def __init__(self, prefix: Prefix, page: int, entered: int) -> None:
        self.prefix, self.page, self.entered = prefix, page, entered
        self.locks = self.hits = 0
        self.unlocked_at = 0
        self.attached = True


class Sequence:
    """What the model knows of a sequence."""

    def __init__(self, seq: SequencePages, namespace: str, tokens: list[int]) -> None:
        self.seq, self.namespace, self.tokens = seq, namespace, tokens
        self.shared: list[SharedPage] = []


# Runs of equal tokens: prompts that share beginnings of every length.
TOKENS = st.builds(
    lambda runs: [i % 2 for i, n in enumerate(runs) for _ in range(n)],
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
).filter(bool)
NAMESPACES = st.sampled_from(["", "", "", "n"])


class KVCacheMachine(RuleBasedStateMachine):
    cache: KVCache
    caching = True

    @initialize(
        policy=st.sampled_from(sorted(EVICTION_POLICIES)),
        page_size=st.integers(1, 3),
        num_pages=st.integers(3, 30),
    )
    def start(self, policy: str, page_size: int, num_pages: int) -> None:
        self.cache = KVCache(num_pages, page_size, enable_prefix_caching=self.caching, eviction_policy=policy)
        self.policy, self.page_size = policy, page_size
        self.tree: dict[Prefix, SharedPage] = {}
        self.live: list[Sequence] = []
        self.deferred: list[int] = []
        self.ticks = 0
        self.num_evicted = 0

    # ---- the model

    def prefix(self, namespace: str, tokens: list[int], num_pages: int) -> Prefix:
        return namespace, tuple(tokens[: num_pages * self.page_size])

    def known(self, namespace: str, tokens: list[int], limit: int) -> list[SharedPage]:
        found = []
        for n in range(1, limit + 1):
            page = self.tree.get(self.prefix(namespace, tokens, n))
            if page is None or not self.caching:
                break
            found.append(page)
        return found

    def lock(self, sequence: Sequence, pages: list[SharedPage]) -> None:
        for page in pages:
            page.locks += 1
            page.hits += 1
        sequence.shared += pages

    def evictable(self) -> list[SharedPage]:
        return [page for page in self.tree.values() if not page.locks]

    def eviction_key(self, page: SharedPage) -> tuple[int, ...]:
        depth = len(page.prefix[1])
        if self.policy == "lru":
            return page.unlocked_at, -depth
        if self.policy == "lfu":
            return min(page.hits, MAX_HITS), page.unlocked_at, -depth
        return page.entered, -depth

    def has_child(self, page: SharedPage) -> bool:
        namespace, tokens = page.prefix
        size = len(tokens) + self.page_size
        return any(ns == namespace and len(t) == size and t[: len(tokens)] == tokens for ns, t in self.tree)

    def evict(self, n: int) -> None:
        """One page at a time, the first leaf by the policy's key."""
        for _ in range(n):
            page = min((p for p in self.evictable() if not self.has_child(p)), key=self.eviction_key)
            del self.tree[page.prefix]
            self.num_evicted += 1

    def num_available(self) -> int:
        return self.cache.num_free + len(self.evictable())

    def convert(self, tokens: list[int], as_array: bool) -> Any:
        return np.array(tokens, np.int32) if as_array else tokens

    def insert(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int, int]]:
        """Enter pages in the model; returns what was remapped. The page list is read before the call."""
        end, first = num_tokens // self.page_size, len(sequence.shared)
        if not self.caching or end <= first:
            return []
        known = self.known(sequence.namespace, sequence.tokens, end)[first:]
        self.lock(sequence, known)
        self.ticks += 1
        for i in range(first + len(known), end):
            page = SharedPage(
                self.prefix(sequence.namespace, sequence.tokens, i + 1), sequence.seq.pages[i], self.ticks
            )
            self.tree[page.prefix] = page
            self.lock(sequence, [page])
        return [(0, first + i, page.page) for i, page in enumerate(known)]

    def unlock(self, sequence: Sequence) -> None:
        self.ticks += 1
        for page in sequence.shared:
            page.locks -= 1
            if not page.locks:
                page.unlocked_at = self.ticks

    # ---- what the scheduler does

    @rule(tokens=TOKENS, namespace=NAMESPACES, as_array=st.booleans())
    def begin(self, tokens: list[int], namespace: str, as_array: bool) -> None:
        expected = self.known(namespace, tokens, (len(tokens) - 1) // self.page_size)
        given = self.convert(tokens, as_array)
        assert self.cache.match_length(given, namespace) == len(expected) * self.page_size
        sequence = Sequence(self.cache.begin(given, namespace), namespace, tokens)
        assert sequence.seq.pages == [page.page for page in expected]
        assert sequence.seq.num_shared == len(expected)
        self.lock(sequence, expected)
        self.live.append(sequence)

    @rule(tokens=TOKENS, namespace=NAMESPACES, chunk=st.integers(1, 30))
    def prefill(self, tokens: list[int], namespace: str, chunk: int) -> None:
        """What most sequences do, so that the tree fills."""
        self.begin(tokens, namespace, False)
        self.reserve(-1, len(tokens))
        for end in range(chunk, len(tokens) + chunk, chunk):
            self.enter(-1, end, False)

    @rule(prompts=st.lists(TOKENS, min_size=1, max_size=6), namespace=NAMESPACES)
    def serve(self, prompts: list[list[int]], namespace: str) -> None:
        for tokens in prompts:
            self.prefill(tokens, namespace, 100)
            self.end_step()
            self.release(-1, len(tokens), False)

    def pick(self, choice: int) -> Sequence:
        return self.live[choice % len(self.live)]

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20), tokens=st.lists(st.integers(0, 1), max_size=3))
    def grow(self, choice: int, tokens: list[int]) -> None:
        self.pick(choice).tokens += tokens

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20), num_tokens=st.integers(0, 20))
    def reserve(self, choice: int, num_tokens: int) -> None:
        seq = self.pick(choice).seq
        before, free = seq.pages.copy(), self.cache.num_free
        missing = max(0, -(-num_tokens // self.page_size) - len(before))
        fits = missing <= self.num_available()
        assert self.cache.reserve(seq, num_tokens) == fits
        if fits:
            self.evict(max(0, missing - free))
        assert seq.pages[: len(before)] == before
        assert len(seq.pages) == len(before) + (missing if fits else 0)

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20))
    def reserve_one(self, choice: int) -> None:
        seq = self.pick(choice).seq
        before, free, fits = seq.pages.copy(), self.cache.num_free, self.num_available() > 0
        page = self.cache.reserve_one(seq)
        assert bool(page) == fits
        if fits:
            self.evict(0 if free else 1)
        assert seq.pages == before + [page] * fits

    @rule(num_pages=st.integers(0, 6))
    def make_room(self, num_pages: int) -> None:
        free, fits = self.cache.num_free, num_pages <= self.num_available()
        assert self.cache.make_room(num_pages) == fits
        if fits:
            self.evict(max(0, num_pages - free))

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20), num_tokens=st.integers(0, 20), as_array=st.booleans())
    def enter(self, choice: int, num_tokens: int, as_array: bool) -> None:
        sequence = self.pick(choice)
        if not all(page.attached for page in sequence.shared):
            return
        num_tokens = min(num_tokens, len(sequence.tokens), len(sequence.seq.pages) * self.page_size)
        before = sequence.seq.pages.copy()
        remapped = self.insert(sequence, num_tokens)
        assert self.cache.enter(sequence.seq, self.convert(sequence.tokens, as_array), num_tokens) == remapped
        self.deferred += [before[index] for _, index, _ in remapped]
        for _, index, page in remapped:
            before[index] = page
        assert sequence.seq.pages == before

    @rule()
    def end_step(self) -> None:
        free = self.cache.num_free
        self.cache.end_step()
        assert self.cache.num_free == free + len(self.deferred)
        self.deferred.clear()

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20), num_tokens=st.integers(0, 20), as_array=st.booleans())
    def release(self, choice: int, num_tokens: int, as_array: bool) -> None:
        sequence = self.pick(choice)
        self.live.remove(sequence)
        num_tokens = min(num_tokens, len(sequence.tokens), len(sequence.seq.pages) * self.page_size)
        if all(page.attached for page in sequence.shared):
            self.insert(sequence, num_tokens)
        self.unlock(sequence)
        self.cache.release(sequence.seq, self.convert(sequence.tokens, as_array), num_tokens)
        assert sequence.seq.pages == [] and sequence.seq.num_shared == 0

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 20), first_page=st.integers(0, 7))
    def take_back(self, choice: int, first_page: int) -> None:
        sequence = self.pick(choice)
        self.cache.take_back(sequence.seq, first_page)
        if first_page < len(sequence.shared) and sequence.shared[first_page].attached:
            namespace, tokens = sequence.shared[first_page].prefix
            for page in list(self.tree.values()):
                if page.prefix[0] == namespace and page.prefix[1][: len(tokens)] == tokens:
                    page.attached = False
                    del self.tree[page.prefix]

    @rule()
    def flush(self) -> None:
        evictable = self.evictable()
        assert self.cache.flush() == len(evictable)
        for page in evictable:
            del self.tree[page.prefix]

    # ---- what must hold after each

    @invariant()
    def agrees(self) -> None:
        check(self.cache, [sequence.seq for sequence in self.live])
        in_tree = [page for node in self.cache._tree.nodes() for page in node.runs[0]]
        assert sorted(in_tree) == sorted(page.page for page in self.tree.values())
        assert self.cache.num_evictable == len(self.evictable())
        assert self.cache.num_available == self.num_available()
        assert self.cache.num_evicted_pages == self.num_evicted
        for sequence in self.live:
            shared = [page.page for page in sequence.shared]
            assert sequence.seq.pages[: sequence.seq.num_shared] == shared
            assert self.cache.is_intact(sequence.seq) == all(page.attached for page in sequence.shared)

    def teardown(self) -> None:
        for sequence in self.live:
            self.cache.release(sequence.seq, sequence.tokens, 0)
        self.cache.end_step()
        self.cache.flush()
        check(self.cache, [])
        assert self.cache.num_free == self.cache.num_pages


class UncachedMachine(KVCacheMachine):
    caching = False


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(
    derandomize=True, max_examples=150, stateful_step_count=40, deadline=None, database=None
)
TestUncached = UncachedMachine.TestCase
TestUncached.settings = settings(
    derandomize=True, max_examples=20, stateful_step_count=30, deadline=None, database=None
)


def filled(cache: KVCache, tokens: list[int], namespace: str = "") -> SequencePages:
    seq = cache.begin(tokens, namespace)
    assert cache.reserve(seq, len(tokens))
    cache.enter(seq, tokens, len(tokens))
    return seq


def test_a_burst_with_one_prompt_computes_it_once() -> None:
    """The second finds at its launch what the first entered at its own; its pages are free after the step."""
    cache, tokens = KVCache(10, 2), [1, 2, 3, 4, 5]
    first, second = cache.begin(tokens), cache.begin(tokens)
    assert cache.reserve(first, 5) and cache.reserve(second, 5)
    own = second.pages.copy()
    assert cache.enter(first, tokens, 5) == []
    assert cache.enter(second, tokens, 5) == [(0, 0, first.pages[0]), (0, 1, first.pages[1])]
    assert second.pages == [*first.pages[:2], own[2]]
    assert cache.num_free == 4, "the duplicates wait for the end of the step"
    check(cache, [first, second])
    cache.end_step()
    assert cache.num_free == 6
    third = cache.begin(tokens)
    assert third.pages == first.pages[:2]
    check(cache, [first, second, third])


def test_a_match_leaves_one_token_to_compute() -> None:
    cache, tokens = KVCache(10, 2), [1, 2, 3, 4]
    cache.release(filled(cache, tokens), tokens, 4)
    assert cache.num_evictable == 2
    assert len(cache.begin(tokens).pages) == 1
    assert len(cache.begin([*tokens, 5]).pages) == 2
    assert cache.match_length([1]) == 0


def test_who_shares_a_failed_page_is_not_intact() -> None:
    cache, tokens = KVCache(10, 2), [1, 2, 3, 4, 5]
    failed, reader = filled(cache, tokens), cache.begin(tokens)
    bystander = cache.begin([1, 2, 9])
    cache.take_back(failed, 1)
    assert not cache.is_intact(failed) and not cache.is_intact(reader) and cache.is_intact(bystander)
    check(cache, [failed, reader, bystander])
    free = cache.num_free
    cache.release(failed, tokens, 4)
    assert cache.num_free == free + 1, "the page that it did not share; what was taken back is still read"
    cache.release(reader, tokens, 0)
    assert cache.num_free == free + 2
    check(cache, [bystander])
    assert cache.match_length(tokens) == 2


def test_release_frees_its_duplicates_at_once() -> None:
    cache, tokens = KVCache(10, 2), [1, 2, 3, 4, 5]
    late = cache.begin(tokens)
    assert cache.reserve(late, 5)
    cache.release(filled(cache, tokens), tokens, 5)
    cache.release(late, tokens, 5)
    check(cache, [])
    assert cache.num_free == 8 and cache.num_evictable == 2


def test_what_is_not_intact_enters_nothing() -> None:
    cache, tokens = KVCache(10, 2), [1, 2, 3, 4, 5, 6]
    seq = cache.begin(tokens)
    assert cache.reserve(seq, 6)
    cache.enter(seq, tokens, 4)
    cache.take_back(seq, 0)
    cache.release(seq, tokens, 6)
    check(cache, [])
    assert cache.num_free == 10 and cache.match_length(tokens) == 0


def test_what_is_released_is_not_to_be_used() -> None:
    cache = KVCache(4, 2)
    seq = cache.begin([1, 2, 3])
    cache.release(seq, [1, 2, 3], 0)
    for call in (
        lambda: cache.release(seq, [1, 2, 3], 0),
        lambda: cache.reserve(seq, 2),
        lambda: cache.reserve_one(seq),
        lambda: cache.enter(seq, [1, 2, 3], 2),
        lambda: cache.take_back(seq, 0),
    ):
        with pytest.raises(AssertionError, match="released"):
            call()


def test_only_tokens_with_pages_are_entered() -> None:
    cache = KVCache(4, 2)
    seq = cache.begin([1, 2, 3, 4])
    assert cache.reserve(seq, 2)
    with pytest.raises(AssertionError, match="4 tokens in 1 pages"):
        cache.enter(seq, [1, 2, 3, 4], 4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_lists_and_arrays_are_one(dtype: Any) -> None:
    cache, tokens = KVCache(8, 2), [1, 2, 3, 4, 5]
    cache.release(filled(cache, tokens), tokens, 5)
    assert cache.match_length(np.array(tokens, dtype)) == 4
    assert cache.match_length(np.array([tokens, tokens], dtype).T[:, 0]) == 4, "not contiguous"
    assert cache.match_length(tuple(tokens)) == 4
    with pytest.raises(struct.error):
        cache.match_length([1, 2, 1 << 40])


def test_check_sees_a_lost_page_and_a_forgotten_sequence() -> None:
    cache = KVCache(8, 2)
    seq = filled(cache, [1, 2, 3, 4, 5])
    with pytest.raises(AssertionError, match="without owner"):
        check(cache, [])
    lost = seq.pages.pop()
    with pytest.raises(AssertionError, match="without owner"):
        check(cache, [seq])
    seq.pages.extend([lost, lost])
    with pytest.raises(AssertionError, match="belongs to a sequence and to a sequence"):
        check(cache, [seq])
    seq.pages.pop()
    check(cache, [seq])
    seq.node.lock_count += 1  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="with 1 locks counts 2"):
        check(cache, [seq])
