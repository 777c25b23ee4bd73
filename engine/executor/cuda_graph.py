"""Which decode steps are captured as CUDA graphs, and when. Used by the CUDA executor on the loop thread.

A graph belongs to a batch size, a page-table width, a set of step buffers (two, by the step's parity, and two more for
steps with drafts) and a kind of sampling. A step that has none runs as the same operations one by one, which is also
the warm-up of its capture.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from engine.executor.cuda_device import CaptureError, CapturesOver, DeviceLayer, Graph

logger = logging.getLogger(__name__)

MODES = ("lazy", "start", "off")
# Pages of the narrowest table (1,024 tokens of context at 16 a page), and the factor to the next. A table far wider
# than its contexts makes the decode kernels split too finely and the gather of table rows long.
FIRST_WIDTH, WIDTH_FACTOR = 64, 2
# At start only tables up to this many pages are captured; longer contexts are captured when they come.
START_WIDTH = 256
# Where as many graphs are there as memory was set aside for, a new one takes the place of one that so many steps went
# without: none of those may be running yet, and two that take turns must not be captured over and over.
IDLE_REPLAYS = 1000


class GraphKey(NamedTuple):
    """size: rows, padding included. width: pages of a table row. side: number of the step's set of buffers.

    draw: how the graph ends. plain; filtered, where some row has top_k, top_p or min_p; open, with the logits, where
    the step draws by operations of its own (penalties, grammars, log-probabilities). adapted: some row has an adapter.
    """

    size: int
    width: int
    side: int
    draw: str
    adapted: bool = False


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that cover 1..max_num_seqs: at most a quarter of a large batch is padding."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 16 if last < 128 else 32 if last < 256 else last // 4))
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def table_widths(max_pages: int) -> list[int]:
    """Widths that cover 1..max_pages."""
    widths = [FIRST_WIDTH]
    while widths[-1] < max_pages:
        widths.append(widths[-1] * WIDTH_FACTOR)
    return [width for width in widths if width < max_pages] + [max_pages]


def start_widths(widths: list[int]) -> list[int]:
    """Those of graphs that are captured at start, or commonly later."""
    return [width for width in widths if width <= START_WIDTH] or widths[:1]


def most_graphs(num_sizes: int, num_sides: int, max_pages: int) -> int:
    """For how many graphs there must be memory: of each size and side, of the commonest widths and one more."""
    widths = table_widths(max_pages)
    return num_sizes * num_sides * min(len(widths), len(start_widths(widths)) + 1)


class GraphCache:
    """Captured graphs by key. mode lazy: at a key's second use, or when the device is idle; start; off.

    most_rows: of steps with drafts, where there are any.
    """

    def __init__(
        self, layer: DeviceLayer, mode: str, max_num_seqs: int, max_pages: int, most_rows: int | None = None
    ) -> None:
        assert mode in MODES, f"--cuda-graph is one of {', '.join(MODES)}"
        self.mode = mode
        self.sizes = graph_sizes(max_num_seqs)
        # Of each side.
        self._sizes = [self.sizes] * 2
        if most_rows is not None:
            self.sizes = self.sizes + [size for size in graph_sizes(most_rows) if size > max_num_seqs]
            self._sizes += [self.sizes] * 2
        self.widths = table_widths(max_pages)
        self._layer = layer
        self._graphs: dict[GraphKey, Graph] = {}
        # Seen but not captured, oldest first: the value says whether the key has run once.
        self._wanted: dict[GraphKey, bool] = {}
        self._failed: set[GraphKey] = set()
        self._over = False
        self.num_replays = 0
        # So many at most; None: any number. And by key: replays before its last use.
        self.most: int | None = None
        self._used_at: dict[GraphKey, int] = {}
        # Where ranks compute together: whether a capture went well with all. A graph holds sums in which all meet, so
        # that all have it or none; and where one captures no more, nobody does.
        self.agree: Callable[[bool], bool] | None = None
        # Where adapters are served, there are graphs with and without them.
        self.families: tuple[bool, ...] = (False,)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

    def key(self, rows: int, pages: int, side: int, draw: str) -> GraphKey:
        """The smallest key that holds a batch. Without graphs there is no reason to pad rows."""
        size = self.sizes[bisect_left(self.sizes, rows)] if self.enabled else rows
        return GraphKey(size, self.width(pages), side, draw)

    def width(self, pages: int) -> int:
        """The narrowest page tables that hold so many pages."""
        return self.widths[bisect_left(self.widths, pages)]

    def at_start(self) -> Iterator[GraphKey]:
        """What mode start captures: every size, largest first, so that their memory pool is laid out once."""
        for width in start_widths(self.widths):
            for size in reversed(self.sizes):
                for side, sizes in enumerate(self._sizes):
                    for adapted in self.families if size in sizes else ():
                        yield GraphKey(size, width, side, "plain", adapted)

    def get(self, key: GraphKey) -> Graph | None:
        graph = self._graphs.get(key)
        if graph is not None:
            self._used_at[key] = self.num_replays
        return graph

    def note_use(self, key: GraphKey) -> bool:
        """A step runs without a graph. True: capture it now, its operations have run before."""
        if not self.enabled or self._over or key in self._failed or not self._has_room():
            return False
        if self._wanted.get(key, False):
            return True
        self._wanted[key] = True
        # The next step has the other parity, and most likely the same size.
        self._wanted.setdefault(key._replace(side=key.side ^ 1), False)
        return False

    def next_wanted(self) -> GraphKey | None:
        return next(iter(self._wanted), None)

    def capture(self, key: GraphKey, work: Callable[[], object]) -> Graph | None:
        """Capture `work` on the current stream. None where it cannot be had: such steps go on without."""
        self._wanted.pop(key, None)
        if not self._has_room():
            return None
        if self.most is not None and len(self._graphs) >= self.most:
            oldest = self._oldest()
            del self._graphs[oldest], self._used_at[oldest]
        graph, problem = None, None
        try:
            graph = self._layer.capture(work)
        except (torch.OutOfMemoryError, CaptureError) as error:
            problem = error
        if self.agree is not None and not self.agree(problem is None):
            problem = CapturesOver(str(problem or "another rank could not"))
        if problem is not None:
            self.give_up(key, problem)
            return None
        self._graphs[key], self._used_at[key] = graph, self.num_replays
        return graph

    def _oldest(self) -> GraphKey:
        return min(self._used_at, key=self._used_at.__getitem__)

    def _has_room(self) -> bool:
        """For one more, or in the place of one that nobody needs."""
        if self.most is None or len(self._graphs) < self.most:
            return True
        return self.num_replays - self._used_at[self._oldest()] >= IDLE_REPLAYS

    def give_up(self, key: GraphKey, error: Exception) -> None:
        """Never try this key again; nor any other, where none can be captured any more."""
        if isinstance(error, CapturesOver):
            if not self._over:
                logger.warning("no more CUDA graphs will be captured: %s", error)
            self._over = True
            self._wanted.clear()
            return
        logger.warning("no CUDA graph for %d rows (%s): %s", key.size, key.draw, error)
        self._wanted.pop(key, None)
        self._failed.add(key)

    def replay(self, graph: Graph) -> None:
        self.num_replays += 1
        self._layer.replay(graph)

    def clear(self) -> None:
        self._graphs.clear()
        self._used_at.clear()
        self._wanted.clear()
        self._layer.drop_graph_memory()
