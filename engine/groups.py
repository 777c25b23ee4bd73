"""Memory groups: which layers of a model share a page table, so that each kind keeps only what it still reads.

Layers that see everything keep every page; layers with a window give pages back behind it. All groups have the same
number of KV buffers, so a page has the same bytes in each of them and one pool serves all. A layer uses the buffer of
its place in its group, with the page ids of its group's table. Layers are counted here without those that keep no K
and V of their own. Imports nothing of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Each group costs a page-table entry per page of a sequence, and a gather of page ids per step.
MAX_GROUPS = 8
# Several groups where they hold at most this share of what one group of all layers would.
WORTH_IT = 0.9


class Chunk(int):
    """The length of a window that does not glide: a query sees what its own block of so many tokens has before it.

    Everywhere a length as others are; but no glided window equals it.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunk) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Chunk, int(self)))


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """window: tokens that a query of these layers sees at most, itself included; None: all.

    layers: their indices, in the order of their buffers; empty where one group has all layers.
    """

    window: int | None = None
    layers: tuple[int, ...] = ()

    def behind(self, num_tokens: int, page_size: int) -> int:
        """Pages at the front of a sequence that no query at index num_tokens, or later, reads."""
        if isinstance(self.window, Chunk):
            return num_tokens // self.window * self.window // page_size
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // page_size

    def most_pages(self, page_size: int) -> int:
        """Pages that a sequence holds at most while it goes on token by token: a window before the last whole page, so
        that others can go on there, too, that page's rest and the page being written."""
        return sys.maxsize if self.window is None else -(-(self.window - 1) // page_size) + 2


def name_of(groups: Sequence[MemoryGroup]) -> str:
    """The same for groups that hold the same: nothing of one that sees all."""
    if tuple(groups) == (MemoryGroup(),):
        return ""
    kinds = (f"{'chunk' if isinstance(group.window, Chunk) else 'window'} {group.window}" for group in groups)
    return "".join(f" {kind} of {group.layers}" for kind, group in zip(kinds, groups, strict=True))


def one_group(windows: Sequence[int | None]) -> tuple[MemoryGroup, ...]:
    """All layers on one table: pages go back once every layer has left them."""
    if len(set(windows)) == 1:
        return (MemoryGroup(windows[0]),)
    # A gliding window reaches back at least as far as a block of its length.
    return (MemoryGroup(None if None in windows else max((int(window or 0) for window in windows), default=None)),)


def plan_groups(windows: Sequence[int | None], max_model_len: int) -> tuple[MemoryGroup, ...]:
    """The groups of a model with these windows, one entry a layer; one group where layers are alike or little is saved.

    The size of a group is the one with which a sequence of max_model_len tokens holds least; a group with fewer layers
    than that leaves buffers unused.
    """
    if not windows:
        return (MemoryGroup(),)
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(None if window is None or window >= max_model_len else window, []).append(layer)
    # Of all groups that are equal, the ones that see more come first.
    ordered = sorted(kinds.items(), key=lambda kind: -(kind[0] or max_model_len))

    def tokens_held(size: int) -> int:
        """Of max_model_len tokens, in all buffers."""
        return sum(-(-len(layers) // size) * size * (window or max_model_len) for window, layers in ordered)

    def num_groups(size: int) -> int:
        return sum(-(-len(layers) // size) for layers in kinds.values())

    sizes = [size for size in range(max(map(len, kinds.values())), 0, -1) if num_groups(size) <= MAX_GROUPS]
    size = min(sizes, key=tokens_held, default=0)
    longest = max(window or max_model_len for window in kinds)
    if len(kinds) == 1 or not size or tokens_held(size) > WORTH_IT * len(windows) * longest:
        return one_group(list(kinds))
    return tuple(
        MemoryGroup(window, tuple(layers[first : first + size]))
        for window, layers in ordered
        for first in range(0, len(layers), size)
    )


def places_of(groups: Sequence[MemoryGroup], num_layers: int) -> list[tuple[int, int]]:
    """For each layer its group and its buffer there."""
    if not any(group.layers for group in groups):
        return [(0, layer) for layer in range(num_layers)]
    places = {layer: (number, index) for number, group in enumerate(groups) for index, layer in enumerate(group.layers)}
    return [places[layer] for layer in range(num_layers)]


def pages_held(groups: Sequence[MemoryGroup], num_tokens: int, page_size: int) -> int:
    """Pages of all groups that a sequence of so many tokens holds at most while it goes on token by token."""
    pages = -(-num_tokens // page_size)
    return sum(min(pages, group.most_pages(page_size)) for group in groups)


def num_buffers(groups: Sequence[MemoryGroup], num_layers: int) -> int:
    """K and V buffers that a page spans."""
    return max((len(group.layers) for group in groups), default=0) or num_layers
