"""PagePool: what it hands out, and that both ends of a page's life are asserted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.page_pool import PagePool


def test_low_ids_first_and_never_the_null_page() -> None:
    pool = PagePool(5)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate_one() == 4
    assert pool.num_free == 1
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [5]
    assert pool.num_free == 0


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=40))
def test_against_a_set(num_pages: int, operations: list[tuple[int, int]]) -> None:
    pool, free, used = PagePool(num_pages), set(range(1, num_pages + 1)), list[int]()
    for kind, n in operations:
        if kind == 0 and n <= len(free):
            pages = pool.allocate(n)
        elif kind == 1 and free:
            pages = [pool.allocate_one()]
        else:
            back = used[::2][:n]
            pool.free(back)
            used = [page for page in used if page not in back]
            free.update(back)
            pages = []
        assert len(set(pages)) == len(pages) and free.issuperset(pages)
        free.difference_update(pages)
        used += pages
        assert pool.num_free == len(free) and set(pool.free_pages()) == free


def test_freeing_is_asserted() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.free(pages[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([pages[1], pages[1]])
    with pytest.raises(AssertionError, match="page 0 is freed twice"):
        pool.free([0])
    with pytest.raises(IndexError):
        pool.free([5])


@pytest.mark.parametrize("one", [True, False])
def test_handing_out_is_asserted(one: bool) -> None:
    """The second of the pair: a free list that somebody else wrote to."""
    pool = PagePool(4)
    page = pool.allocate_one()
    pool._free.append(page)
    with pytest.raises(AssertionError, match="free list and in use"):
        pool.allocate_one() if one else pool.allocate(2)


def test_too_much() -> None:
    with pytest.raises(AssertionError, match="3 pages asked for, 2 are free"):
        PagePool(2).allocate(3)
    with pytest.raises(AssertionError, match="at least one page"):
        PagePool(0)
