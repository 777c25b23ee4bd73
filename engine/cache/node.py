"""Node: an edge of the radix tree and the place below it, with what hangs there: windows' parts, a snapshot.

Data alone: what may change when is the RadixTree's.
"""

from __future__ import annotations

from engine.cache.eviction.ring import Link

TOKEN_BYTES = 4  # a token is an int32 in the bytes that the tree takes

Runs = list[list[int]]  # page ids by group, all of one length


class Node(Link):
    """One edge and the place below it. `tokens` may be longer than the run: a tail is trimmed lazily."""

    __slots__ = (
        "children",  # first page's bytes -> Node
        "detached",  # no longer in the tree
        "entered",  # tick at which its pages were entered
        "hits",  # locks so far
        "key",  # bytes of the first page; of a root, its namespace
        "lock_count",  # locks held at this node or below it
        "parent",  # None: a root
        "parts",  # what is to be known of its windows, in the tree's order of them
        "queued",  # the eviction policy's
        "runs",
        "snapshot",  # of the recurrent state at its end
        "tokens",
        "used",  # tick at which its last lock went
    )

    def __init__(self, parent: Node | None, key: bytes, tokens: bytes, runs: Runs) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.runs = runs
        self.children: dict[bytes, Node] = {}
        self.parts: list[Part] = []
        self.snapshot: Snapshot | None = None
        self.lock_count = 0
        self.hits = 0
        self.entered = 0
        self.used = 0
        self.queued = False
        self.detached = False

    @property
    def length(self) -> int:
        """Pages of the run."""
        return len(self.runs[0])


class Part(Link):
    """The pages of a node in the groups of one window: the first `hole` are gone, those up to free_to may go.

    locks: first page that is needed -> locks that need it and all behind it; free_to is the least of them. While
    hole < free_to, the part is in its window's order of eviction.
    """

    __slots__ = ("free_to", "hole", "locks", "node", "used", "window")

    def __init__(self, node: Node, window: int, hole: int, free_to: int) -> None:
        self.node = node
        self.window = window  # its number
        self.hole = hole
        self.free_to = free_to
        self.locks: dict[int, int] = {}
        self.used = 0


class Snapshot(Link):
    """A recurrent state that is kept at the end of a node. Needs no lock: who loads it does so before anything else can
    be written to its place. pins: of others, who load it later."""

    __slots__ = ("id", "node", "pins")

    def __init__(self, node: Node, snapshot_id: int) -> None:
        self.node = node
        self.id = snapshot_id
        self.pins = 0

    @property
    def is_there(self) -> bool:
        """Nobody has taken it off, and so nobody has written to its place."""
        return self.node.snapshot is self
