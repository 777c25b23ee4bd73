"""RadixTree by itself: matches, splits, canonical pages, locks, partial eviction, detaching, and a dict as model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.cache.node import Node
from engine.cache.radix_tree import RadixTree

PAGE_SIZE = 2


def make_tree(policy: str = "lru") -> RadixTree:
    return RadixTree(PAGE_SIZE, EVICTION_POLICIES[policy]())


def to_bytes(pages: str) -> bytes:
    """One letter is one page of tokens."""
    return np.repeat(np.frombuffer(pages.encode(), np.uint8), PAGE_SIZE).astype(np.int32).tobytes()


def insert_below(tree: RadixTree, node: Node, text: str, depth: int, pages: list[int]) -> tuple[Node, list[int]]:
    node, canonical = tree.insert(node, to_bytes(text), depth, [pages])
    return node, canonical[0]


def insert(tree: RadixTree, text: str, pages: list[int], namespace: str = "") -> tuple[Node, list[int]]:
    return insert_below(tree, tree.open(namespace), text, 0, pages)


def match(tree: RadixTree, text: str, limit: int, namespace: str = "") -> tuple[Node, list[int]]:
    found = tree.match(tree.open(namespace), to_bytes(text), limit)
    return found.node, found.runs[0]


def store(tree: RadixTree, text: str, pages: list[int], namespace: str = "") -> list[int]:
    node, canonical = insert(tree, text, pages, namespace)
    assert tree.unlock(node) == []
    return canonical


def find(tree: RadixTree, text: str, namespace: str = "") -> list[int]:
    node, pages = match(tree, text, len(text), namespace)
    tree.unlock(node)
    return pages


def shape(tree: RadixTree) -> list[tuple[list[int], int]]:
    return sorted((node.runs[0], node.lock_count) for node in tree.nodes())


def test_match_splits_where_it_ends() -> None:
    tree = make_tree()
    assert store(tree, "abcd", [1, 2, 3, 4]) == []
    assert tree.match_length("", to_bytes("abxy"), 4) == 2
    assert tree.match_length("", to_bytes("abcd"), 3) == 3
    assert shape(tree) == [([1, 2, 3, 4], 0)], "match_length splits nothing"
    node, pages = match(tree, "abxy", 4)
    assert pages == [1, 2]
    assert shape(tree) == [([1, 2], 1), ([3, 4], 0)]
    assert tree.num_evictable == 2
    tree.unlock(node)
    assert tree.num_evictable == 4
    assert find(tree, "abcd") == [1, 2, 3, 4]
    assert find(tree, "xbcd") == []


def test_a_page_matches_whole_or_not_at_all() -> None:
    tree = make_tree()
    store(tree, "ab", [1, 2])
    half = np.frombuffer(to_bytes("ab"), np.int32).copy()
    half[3] += 1
    assert tree.match_length("", half.tobytes(), 2) == 1


def test_a_lock_stays_with_the_deeper_part_of_a_split() -> None:
    tree = make_tree()
    deep, _ = insert(tree, "abcd", [1, 2, 3, 4])
    assert find(tree, "ab") == [1, 2]
    assert shape(tree) == [([1, 2], 1), ([3, 4], 1)]
    assert deep.runs[0] == [3, 4] and tree.num_evictable == 0
    tree.unlock(deep)
    assert tree.num_evictable == 4


def test_insert_returns_the_canonical_pages() -> None:
    tree = make_tree()
    store(tree, "abcd", [1, 2, 3, 4])
    assert store(tree, "abxy", [11, 12, 13, 14]) == [1, 2], "11 and 12 are duplicates, 13 and 14 the tree's"
    assert find(tree, "abxy") == [1, 2, 13, 14]
    assert store(tree, "ab", [21, 22]) == [1, 2]
    node, pages = match(tree, "abxy", 2)
    node, canonical = insert_below(tree, node, "abxyz", 2, [31, 32, 33])
    assert (pages, canonical) == ([1, 2], [13, 14])
    assert tree.unlock(node) == [] and find(tree, "abxyz") == [1, 2, 13, 14, 33]


def test_namespaces_share_nothing_but_the_order() -> None:
    tree = make_tree()
    store(tree, "ab", [1, 2])
    assert tree.match_length("tenant", to_bytes("ab"), 2) == 0
    assert store(tree, "ab", [3, 4], "tenant") == []
    assert find(tree, "ab") == [1, 2]
    assert tree.evict(3) == [3, 4, 2]
    assert len(tree.roots()) == 1, "a namespace goes with its last page"
    store(tree, "a", [5], "\ud800")  # a name is any str
    assert find(tree, "a", "\ud800") == [5]


def test_a_root_lives_while_it_is_locked() -> None:
    tree = make_tree()
    root = tree.open("x")
    store(tree, "a", [1], "x")
    assert tree.evict(1) == [1]
    node, _ = insert_below(tree, root, "a", 0, [2])
    assert find(tree, "a", "x") == [2]
    tree.unlock(node)
    assert tree.evict(9) == [2] and tree.roots() == []
    root = tree.open("y")
    tree.unlock(root)
    assert tree.roots() == []


def test_a_leaf_gives_up_its_tail_first() -> None:
    tree = make_tree()
    store(tree, "abcdefgh", [1, 2, 3, 4, 5, 6, 7, 8])
    assert tree.evict(1) == [8]
    assert find(tree, "abcdefgh") == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(tree.evict(2)) == [6, 7]
    assert tree.match_length("", to_bytes("abcdefgh"), 8) == 5, "trimmed tokens must not match"
    # A split and an insert below a run whose tokens are trimmed lazily.
    assert find(tree, "abc") == [1, 2, 3]
    assert store(tree, "abcdefgh", [0, 0, 0, 0, 0, 16, 17, 18]) == [1, 2, 3, 4, 5]
    assert find(tree, "abcdefgh") == [1, 2, 3, 4, 5, 16, 17, 18]
    assert tree.num_evictable == 8


def test_trimmed_tokens_are_dropped_in_time() -> None:
    tree = make_tree()
    store(tree, "abcdefgh" * 16, list(range(1, 129)))
    (node,) = tree.nodes()
    for left in range(127, 0, -1):
        tree.evict(1)
        assert len(node.tokens) < 2 * (left + 1) * PAGE_SIZE * 4


def test_locked_pages_are_not_evicted() -> None:
    tree = make_tree()
    store(tree, "abcd", [1, 2, 3, 4])
    node, _ = match(tree, "ab", 2)
    assert tree.evict(9) == [3, 4]
    assert tree.evict(9) == []
    tree.unlock(node)
    assert sorted(tree.evict(9)) == [1, 2]
    with pytest.raises(AssertionError, match="not locked"):
        tree.unlock(node)


def test_detach_frees_now_what_nobody_holds_and_the_rest_later() -> None:
    tree = make_tree()
    store(tree, "abx", [1, 2, 9])
    failed, _ = insert(tree, "abcd", [0, 0, 3, 4])
    other, _ = insert(tree, "abcde", [0, 0, 0, 0, 5])
    store(tree, "abcdf", [0, 0, 0, 0, 6])
    assert tree.detach(failed, 4, 3) == [6], "4 and 5 are locked, 3 stays"
    assert failed.detached and other.detached
    assert find(tree, "abcdef") == [1, 2, 3]
    assert find(tree, "abx") == [1, 2, 9]
    assert tree.detach(other, 5, 3) == [], "taken back already"
    store(tree, "abcd", [0, 0, 0, 14])
    assert tree.detach(other, 5, 4) == [] and find(tree, "abcd") == [1, 2, 3, 14]
    assert tree.unlock(failed) == []
    assert tree.unlock(other) == [5, 4]
    assert tree.num_evictable == 5


def test_detach_above_what_was_detached() -> None:
    tree = make_tree()
    failed, _ = insert(tree, "abcd", [1, 2, 3, 4])
    tree.detach(failed, 4, 2)
    store(tree, "abxy", [0, 0, 5, 6])
    assert sorted(tree.detach(failed, 4, 1)) == [5, 6]
    assert find(tree, "abcd") == [1]
    assert sorted(tree.unlock(failed)) == [2, 3, 4]


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "match", "unlock", "evict"]),
            st.text("ab", max_size=7),
            st.sampled_from(["", "n"]),
            st.integers(0, 9),
        ),
        max_size=30,
    )
)
def test_against_a_dict(policy: str, operations: list[tuple[str, str, str, int]]) -> None:
    """The model: (namespace, prefix) -> page. Held: the prefixes on locked paths, with their locks."""
    tree, model, next_page = make_tree(policy), dict[tuple[str, str], int](), 1
    held: list[tuple[Node, str, str]] = []
    for operation, text, namespace, n in operations:
        known = 0
        while known < len(text) and (namespace, text[: known + 1]) in model:
            known += 1
        expected = [model[namespace, text[: i + 1]] for i in range(known)]
        assert tree.match_length(namespace, to_bytes(text), len(text)) == known
        if operation == "match":
            node, pages = match(tree, text, len(text), namespace)
            assert pages == expected
            held.append((node, namespace, text[:known]))
        elif operation == "insert":
            pages = list(range(next_page, next_page + len(text)))
            next_page += len(text)
            node, canonical = insert(tree, text, pages, namespace)
            assert canonical == expected
            for i in range(known, len(text)):
                model[namespace, text[: i + 1]] = pages[i]
            held.append((node, namespace, text))
        elif operation == "unlock" and held:
            assert tree.unlock(held.pop(n % len(held))[0]) == []
        elif operation == "evict":
            locked = {(ns, text[:i]) for _, ns, text in held for i in range(len(text) + 1)}
            evictable = {page for key, page in model.items() if key not in locked}
            assert tree.num_evictable == len(evictable)
            freed = tree.evict(n)
            assert len(freed) == min(n, len(evictable)) and evictable.issuperset(freed)
            model = {key: page for key, page in model.items() if page not in freed}
        for (ns, prefix), page in model.items():
            assert len(prefix) == 1 or (ns, prefix[:-1]) in model, "a page went before one that stands on it"
            assert page in [p for node in tree.nodes() for p in node.runs[0]]
        for node, ns, text in held:
            assert node.lock_count >= sum(1 for other in held if other[1:] == (ns, text))
    for node, _, _ in held:
        tree.unlock(node)
    assert sorted(tree.evict(10**6)) == sorted(model.values()) and tree.roots() == []


def test_pinned_snapshots_are_passed_over_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; they stand in line again, as the youngest, when nobody has them pinned any more."""
    tree = RadixTree(PAGE_SIZE, EVICTION_POLICIES["lru"](), has_state=True)
    nodes = []
    for number, name in enumerate("abcdef", 1):
        node, _ = insert(tree, name, [number])
        assert tree.attach(node, 1, 1, number)
        nodes.append(node)
    snapshots = tree.snapshots()
    for snapshot in snapshots[:4]:
        tree.pin(snapshot, 1)
    tree.pin(snapshots[0], 1)
    # Loading one that is pinned does not bring it back into the line.
    tree.unlock(match(tree, "b", 1)[0])
    with monkeypatch.context() as patched:

        def fail(ring: object) -> None:
            raise AssertionError("it looked at one after the other")

        patched.setattr("engine.cache.eviction.ring.Ring.__iter__", fail)
        assert tree.oldest_snapshot() == 5
        tree.pin(snapshots[0], -1)
        tree.pin(snapshots[2], -1)
        assert [tree.oldest_snapshot() for _ in range(3)] == [6, 3, 0]
        tree.pin(snapshots[0], -1)
        assert tree.oldest_snapshot() == 1
    # One that went with its node, as after a step that failed, is nobody's.
    tree.detach(nodes[1], 1, 0)
    assert tree.lost_snapshots == [2]
    tree.pin(snapshots[1], -1)
    assert [one.id for one in tree.snapshots()] == [4]
