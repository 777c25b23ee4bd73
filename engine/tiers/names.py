"""TierNames: under which names a store has what a prompt needs, and how far it would get with what is there.

A page's name is that of its place in the chain of the prompt's pages; in every memory group but the first it is
another one, and so it is of the snapshot of a recurrent state at that place. Loop thread; asks the store alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from engine.cache.kv_cache import SequencePages
from engine.cache.node import Snapshot
from engine.forward import Int32Array, Limits
from engine.page_names import page_names, root_name
from engine.request import Request


class Names(Protocol):
    """A store, as far as it is asked here."""

    def __contains__(self, name: bytes, /) -> bool: ...


class Item(NamedTuple):
    """What is carried at once. place: of a page, or of a snapshot where is_state. snapshot: what it was as a place of
    the tree, for one that may lose it meanwhile."""

    name: bytes
    place: int
    is_state: bool = False
    snapshot: Snapshot | None = None

    @property
    def is_there(self) -> bool:
        return self.snapshot is None or self.snapshot.is_there


class TierNames:
    """See the module. layout: of the memory, and the weights."""

    def __init__(self, layout: str, limits: Limits) -> None:
        self._layout = layout
        self._page_size, self._groups = limits.page_size, limits.groups
        self._has_state = limits.num_snapshots is not None
        self._full = [number for number, group in enumerate(limits.groups) if group.window is None]
        self._windowed = [number for number, group in enumerate(limits.groups) if group.window is not None]
        # As KVCache, which tells of its pages.
        self._told_group = (self._full or [0])[0]
        self._last: tuple[Request, Int32Array, list[bytes]] | None = None

    @property
    def comes_whole(self) -> bool:
        """With less than all that a prompt needs at one place nobody can go on."""
        return self._has_state or bool(self._windowed)

    @property
    def has_windows(self) -> bool:
        return bool(self._windowed)

    def chain(self, request: Request) -> tuple[Int32Array, list[bytes]]:
        """A prompt as an array, and the names of its pages: those of the last one are kept, for it is asked about more
        than once as it comes, and a long one takes milliseconds."""
        if self._last is None or self._last[0] is not request:
            tokens = np.array(request.prompt_token_ids, np.int32)
            count = (len(tokens) - 1) // self._page_size
            names = page_names(self._root_of(request), tokens.tobytes(), self._page_size, 0, count)
            self._last = request, tokens, names
        return self._last[1:]

    def told(self, chain: Sequence[bytes]) -> list[bytes]:
        """The names in the group whose pages stand for all."""
        return [self._page(name, self._told_group) for name in chain]

    def _root_of(self, request: Request) -> bytes:
        """Of an adapter by what is in its files: its version is a number of this process."""
        if request.adapter is not None:
            return root_name(self._layout, request.namespace, f"adapter {request.adapter.digest}")
        return root_name(self._layout, request.cache_root)

    def reach(self, store: Names, chain: Sequence[bytes], first: int) -> int:
        """The most pages behind which a prompt could go on with what is there and the `first` that it has; these where
        nothing is there."""
        depth = first
        while depth < len(chain) and all(self._page(chain[depth], group) in store for group in self._full):
            depth += 1
        while depth > first:
            missing = self._last_missing(store, chain, first, depth)
            if missing is None:
                return depth
            depth = missing
        return first

    def _last_missing(self, store: Names, chain: Sequence[bytes], first: int, depth: int) -> int | None:
        """Of what must be there beside pages that see all, to go on behind `depth` pages: which keeps everybody from
        going on between it and there. None: all is there."""
        if self._has_state and self._state(chain[depth - 1]) not in store:
            return depth - 1
        begins = [self._begin(group, first, depth) for group in self._windowed]
        for index in range(depth - 1, min(begins, default=depth) - 1, -1):
            for group, begin in zip(self._windowed, begins, strict=True):
                if index >= begin and self._page(chain[index], group) not in store:
                    return index
        # Where nothing is needed, nothing says that anybody was there.
        return None if self._full or self._has_state or min(begins) < depth else depth - 1

    def _begin(self, group: int, first: int, depth: int) -> int:
        """Where the pages begin that are wanted of a group."""
        return max(first, self._groups[group].behind(depth * self._page_size, self._page_size))

    def to_read(self, chain: Sequence[bytes], pages: SequencePages, depth: int) -> list[Item]:
        """What a sequence that has its shared pages lacks of `depth` pages, page by page."""
        first = pages.num_shared
        begins = [self._begin(group, first, depth) for group in range(len(self._groups))]
        items = [
            Item(self._page(chain[index], group), own[index])
            for index in range(first, depth)
            for group, (own, begin) in enumerate(zip(pages.lists, begins, strict=True))
            if index >= begin
        ]
        if self._has_state:
            assert pages.kept is not None
            items.append(Item(self._state(chain[depth - 1]), pages.kept[0], is_state=True))
        return items

    def to_write(
        self, chain: Sequence[bytes], pages: SequencePages, snapshots: Sequence[tuple[int, Snapshot]]
    ) -> list[Item]:
        """What a sequence holds, page by page, and the snapshots on its way."""
        items = [
            Item(self._page(chain[index], group), own[index])
            for index in range(pages.num_shared)
            for group, own in enumerate(pages.lists)
            if index >= pages.gone[group]
        ]
        items += [Item(self._state(chain[depth - 1]), one.id, is_state=True, snapshot=one) for depth, one in snapshots]
        return items

    @staticmethod
    def _page(name: bytes, group: int) -> bytes:
        return hashlib.sha256(name + b"group %d" % group).digest() if group else name

    @staticmethod
    def _state(name: bytes) -> bytes:
        return hashlib.sha256(name + b"state").digest()
