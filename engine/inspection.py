"""What the engine holds at this moment: who runs, who waits, whose the pages are, the radix tree.

Read on the loop thread and changes nothing. What may be large is read in slices, between which the loop goes on, so a
picture may be some milliseconds uneven; and it is bounded: the largest nodes, the first of a queue.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.cache.kv_cache import SequencePages
from engine.cache.node import Node
from engine.publisher import Publisher
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus

T = TypeVar("T")

# Seconds that the loop may be held at once.
SLICE_S = 0.0005
MAX_ROWS = 256
MAX_NODES = 192
MAX_VISITED = 4096
MAX_CHILDREN = 256
MAX_CELLS = 2048
_PAGES_AT_ONCE = 2048

# Whose a page is. CACHED: the tree's, in use by one sequence. EVICTABLE: the tree's, in use by nobody.
FREE, RUNNING, CACHED, SHARED, EVICTABLE = range(5)
PAGE_STATES = ("free", "running", "cached", "shared", "evictable")


@dataclass(slots=True)
class Row:
    """A sequence that runs or waits. Tokens unless said; seconds since it came, and since it was admitted.

    state: prefill, decode, or what it waits for (Scheduler.obstacle, or retracted). wanted: pages that it waits for.
    """

    id: str
    state: str
    prompt: int
    cached: int
    computed: int
    output: int
    most: int
    pages: int
    shared: int
    wanted: int
    retractions: int
    age: float
    running: float | None


@dataclass(slots=True)
class Pool:
    """cells: a digit for each (see PAGE_STATES), which stands for `pages_per_cell` pages: the commonest of them.

    unfilled: share of what running sequences hold that has no token yet. free_runs, longest_run: how scattered the
    free pages are; it costs nothing, for a page is as good as any other.
    """

    counts: dict[str, int]
    cells: str
    pages_per_cell: int
    unfilled: float
    free_runs: int
    longest_run: int


@dataclass(slots=True)
class TreeNode:
    """parent: its place in the list, -1 for a root's child. start, pages: where its run begins, how long it is.

    hits: who has come by since it was entered. locks: who holds it now. hidden: children that are not in the list.
    tokens: its first ones.
    """

    parent: int
    namespace: int
    start: int
    pages: int
    hits: int
    locks: int
    hidden: int
    tokens: list[int]


@dataclass(slots=True)
class Tree:
    """The nodes with the most use, parents before children. num_seen: nodes looked at; is_whole: there are no more."""

    nodes: list[TreeNode] = field(default_factory=list)
    num_namespaces: int = 0
    num_seen: int = 0
    is_whole: bool = True


class Inspection:
    """See the module. page_size: tokens."""

    def __init__(self, scheduler: Scheduler, publisher: Publisher) -> None:
        self._scheduler = scheduler
        self._publisher = publisher
        self._cache = scheduler.kv_cache
        # What all slices took.
        self.seconds_spent = 0.0

    async def _in_slices(self, work: Generator[None, None, T]) -> T:
        """Run a generator to its end, and let the loop do other things every SLICE_S."""
        began = time.thread_time()
        while True:
            try:
                next(work)
            except StopIteration as end:
                self.seconds_spent += time.thread_time() - began
                result: T = end.value
                return result
            if (took := time.thread_time() - began) > SLICE_S:
                self.seconds_spent += took
                await asyncio.sleep(0)
                began = time.thread_time()

    # ---- sequences

    def running(self, now: float) -> tuple[list[Row], int]:
        """The oldest MAX_ROWS, and how many there are."""
        owners = self._scheduler.slot_owners
        here = [one for one in owners if one is not None and one.status is SequenceStatus.RUNNING]
        here.sort(key=lambda sequence: sequence.order)
        return [self._row(one, now) for one in here[:MAX_ROWS]], len(here)

    def waiting(self, now: float) -> tuple[list[Row], int]:
        """In the order in which they came (the policy's may be another), the oldest MAX_ROWS."""
        listeners = self._publisher.listeners.values()
        waits = (listener for listener in listeners if listener.sequence.status is SequenceStatus.WAITING)
        return [self._row(listener.sequence, now) for listener in islice(waits, MAX_ROWS)], self._scheduler.num_waiting

    def row(self, request_id: str, now: float) -> Row | None:
        listener = self._publisher.listeners.get(request_id)
        return None if listener is None else self._row(listener.sequence, now)

    def _row(self, sequence: Sequence, now: float) -> Row:
        if sequence.status is SequenceStatus.WAITING:
            state = "retracted" if sequence.is_retracted else self._scheduler.obstacle(sequence)
        else:
            state = "prefill" if sequence.listener.stream.first_token_at is None else "decode"
        pages = sequence.pages
        return Row(
            sequence.request.request_id,
            state,
            sequence.num_prompt_tokens,
            sequence.num_cached_tokens,
            sequence.num_computed_tokens,
            sequence.num_tokens - sequence.num_prompt_tokens,
            sequence.max_length,
            pages.num_held if pages is not None else 0,
            pages.num_shared * len(pages.lists) - sum(min(gone, pages.num_shared) for gone in pages.gone)
            if pages is not None
            else 0,
            sequence.pages_wanted,
            sequence.num_retractions,
            now - sequence.arrived_at,
            None if sequence.admitted_at is None else now - sequence.admitted_at,
        )

    # ---- pages

    async def pool(self) -> Pool:
        return await self._in_slices(self._pool())

    def _pool(self) -> Generator[None, None, Pool]:
        cache = self._cache
        states = np.where(cache.is_free(), np.uint8(FREE), np.uint8(EVICTABLE))
        seen: set[Node] = set()
        held = filled = 0
        for sequence in self._scheduler.live_sequences():
            pages = sequence.pages
            if pages is None or pages.node is None:
                continue  # it has left meanwhile
            for part in _private(pages):
                states[part] = RUNNING
                yield
            held += pages.num_held * cache.page_size
            filled += min(sequence.num_tokens * len(pages.lists), pages.num_held * cache.page_size)
            node: Node | None = pages.node
            while node is not None and node not in seen:
                seen.add(node)
                for run in node.runs:
                    for part in _parts(run):
                        states[part] = SHARED if node.lock_count > 1 else CACHED
                        yield
                node = node.parent
        free = states == FREE
        edges = np.flatnonzero(np.diff(free, prepend=False, append=False))
        lengths = edges[1::2] - edges[::2]
        counts = np.bincount(states, minlength=len(PAGE_STATES))
        yield
        per_cell = -(-len(states) // MAX_CELLS)
        return Pool(
            dict(zip(PAGE_STATES, counts.tolist(), strict=True)),
            _commonest(states, per_cell),
            per_cell,
            1.0 - filled / held if held else 0.0,
            len(lengths),
            int(lengths.max(initial=0)),
        )

    # ---- the radix tree

    async def tree(self) -> Tree:
        return await self._in_slices(self._tree())

    def _tree(self) -> Generator[None, None, Tree]:
        """From the roots on, always below the node that has been of the most use."""
        roots = self._cache.roots()
        tree = Tree(num_namespaces=len(roots))
        heap: list[tuple[int, int, Node, int, int, int]] = []
        pushed = 0

        def push(parent: Node, place: int, namespace: int, start: int) -> int:
            nonlocal pushed
            children = list(islice(parent.children.values(), MAX_CHILDREN))
            for child in children:
                pushed += 1
                heapq.heappush(heap, (-child.length * child.hits, pushed, child, place, namespace, start))
            return len(parent.children)

        for number, root in enumerate(roots[:MAX_CHILDREN]):
            push(root, -1, number, 0)
            yield
        while heap and len(tree.nodes) < MAX_NODES and pushed < MAX_VISITED:
            _, _, node, parent, namespace, start = heapq.heappop(heap)
            if node.detached:
                continue
            place, length = len(tree.nodes), node.length
            first = np.frombuffer(node.tokens, np.int32, min(8, len(node.tokens) // 4)).tolist()
            shown = TreeNode(parent, namespace, start, length, node.hits, node.lock_count, 0, first)
            tree.nodes.append(shown)
            shown.hidden = push(node, place, namespace, start + length)
            if parent >= 0:
                tree.nodes[parent].hidden -= 1
            yield
        tree.num_seen, tree.is_whole = pushed, not heap
        return tree


def _parts(pages: list[int]) -> Iterator[npt.NDArray[np.intp]]:
    """Page ids as indices from 0, some at a time, null pages left out."""
    for first in range(0, len(pages), _PAGES_AT_ONCE):
        part = np.array(pages[first : first + _PAGES_AT_ONCE], np.intp)
        yield part[part > 0] - 1


def _private(pages: SequencePages) -> Iterator[npt.NDArray[np.intp]]:
    for ids, gone in zip(pages.lists, pages.gone, strict=True):
        yield from _parts(ids[max(pages.num_shared, gone) :])


def _commonest(states: npt.NDArray[np.uint8], per_cell: int) -> str:
    """A digit a cell."""
    if per_cell > 1:
        missing = -len(states) % per_cell
        table = np.concatenate([states, np.full(missing, states[-1], np.uint8)]).reshape(-1, per_cell)
        counts = np.stack([(table == state).sum(axis=1) for state in range(len(PAGE_STATES))])
        states = counts.argmax(axis=0).astype(np.uint8)
    return (states + ord("0")).astype(np.uint8).tobytes().decode()
