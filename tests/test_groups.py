"""Which layers share a page table, by their windows alone."""

from __future__ import annotations

import pytest

from engine.forward import Limits
from engine.groups import MAX_GROUPS, Chunk, MemoryGroup, num_buffers, one_group, pages_held, places_of, plan_groups

CONTEXT = 32_768


def every(period: int, layers: int, window: int) -> list[int | None]:
    """Layers with a window, and every period-th sees all."""
    return [None if layer % period == period - 1 else window for layer in range(layers)]


# The windows of the layers, the windows of the groups, the buffers of each.
PLANS: dict[str, tuple[list[int | None], list[int | None], int]] = {
    "all alike": ([None] * 32, [None], 32),
    "one window": ([4096] * 32, [4096], 32),
    "one layer": ([None], [None], 1),
    "windows as long as the context": ([None, CONTEXT, 2 * CONTEXT], [None], 3),
    "half and half": (every(2, 24, 128), [None, 128], 12),
    "five of six": (every(6, 48, 1024), [None, *[1024] * 5], 8),
    "29 and 5": (every(6, 34, 1024), [None, *[1024] * 6], 5),
    "52 and 10": (every(6, 62, 1024), [None, *[1024] * 6], 10),
    # As many groups as there may be, and not one of a single layer each.
    "one of 28 sees all": ([None, *[512] * 27], [None, *[512] * 7], 4),
    "two windows": ([512] * 8 + [4096] * 8, [4096, 512], 8),
    "three kinds": ([None] * 4 + [512] * 8 + [4096] * 4, [None, 4096, 512, 512], 4),
    "too little is saved": ([None] * 8 + [30_000] * 2, [None], 10),
    "all have windows, and little is saved": ([30_000] * 8 + [29_000] * 2, [30_000], 10),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str) -> None:
    windows, expected, buffers = PLANS[name]
    groups = plan_groups(windows, CONTEXT)
    assert [group.window for group in groups] == expected
    assert num_buffers(groups, len(windows)) == buffers
    assert len(groups) <= MAX_GROUPS
    places = places_of(groups, len(windows))
    assert len(set(places)) == len(windows), "two layers share a buffer of one group"
    for (group, buffer), window in zip(places, windows, strict=True):
        assert 0 <= buffer < buffers
        seen = groups[group].window
        assert seen is None or seen == window or len(groups) == 1, "a layer is in a group that forgets too much"


def test_one_group_keeps_what_the_longest_window_sees() -> None:
    assert one_group([512, 4096]) == (MemoryGroup(4096),)
    assert one_group([512, None]) == (MemoryGroup(None),)


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 9, 100])
def test_most_pages_are_enough_and_no_more(window: int, page_size: int) -> None:
    """Kept before a token is written: all that it sees, and all that one at the start of its page would."""
    group, most = MemoryGroup(window), 0
    for token in range(1, 400):
        boundary = (token - 1) // page_size * page_size
        behind = group.behind(boundary, page_size)
        assert behind * page_size <= max(0, boundary - window + 1), "somebody who goes on there sees a page that went"
        most = max(most, token // page_size + 1 - behind)
    assert most == group.most_pages(page_size)


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 9, 100])
def test_pages_of_a_chunk_go_with_it(chunk: int, page_size: int) -> None:
    group, most = MemoryGroup(Chunk(chunk)), 0
    for token in range(1, 400):
        boundary = (token - 1) // page_size * page_size
        behind = group.behind(boundary, page_size)
        assert behind * page_size <= boundary // chunk * chunk < (behind + 1) * page_size
        most = max(most, token // page_size + 1 - behind)
    assert most <= group.most_pages(page_size) <= most + 1


def test_a_chunk_is_no_window() -> None:
    assert Chunk(8) != 8 and Chunk(8) == Chunk(8) and len({Chunk(8), 8}) == 2
    assert one_group([Chunk(8), Chunk(8)]) == (MemoryGroup(Chunk(8)),)
    assert one_group([Chunk(8), 8]) == one_group([Chunk(8), Chunk(4)]) == (MemoryGroup(8),)
    assert [group.window for group in plan_groups([8, Chunk(8), None], CONTEXT)] == [None, 8, Chunk(8)]


def test_what_one_sequence_can_have() -> None:
    def most(num_pages: int, *windows: int | None) -> int:
        groups = tuple(MemoryGroup(window) for window in windows)
        limits = Limits(1, 16, 4096, 16, num_pages, 10, groups)
        held = pages_held(groups, limits.max_cached_tokens, 16)
        assert held <= num_pages
        more = limits.max_cached_tokens + 1
        assert limits.max_cached_tokens == 4096 or pages_held(groups, more, 16) > num_pages
        return limits.max_cached_tokens

    assert most(10, None) == 160
    assert most(10, 64) == 4096, "a window's pages are enough for ever"
    assert most(5, 64) == 80, "less than a window's hold a text that is shorter"
    assert most(40, None, 64) == (40 - 6) * 16
    assert most(40, None, 64, 64) == (40 - 12) * 16
    assert most(9, None, 64, 32) == 48
    assert most(10, None, 64, 32) == 48
    assert most(3, None, None) == 16
