"""The protocol of a connector: how bytes of KV pages get from one server's memory into another's.

Who may read what, and whether it was still there when it had been read, is exchange.py's. A connector is a file of its
own and a line in registry.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from engine.executor.base import PageMemory
from engine.forward import Int32Array

Json = dict[str, Any]


class TransferError(Exception):
    """Pages could not be had. reason: one of a few words, which are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Connector(Protocol):
    """Called on the loop thread, and never blocks for long but for `register`, `release` of all, and `close`.

    Places are int32 arrays, one for each memory: pages of the KV cache, and snapshots of recurrent states where there
    are any.
    """

    def register(self, memories: Sequence[PageMemory]) -> None:
        """From now on these are what others read, and what is read into. Raises StartupError."""
        ...

    def describe(self, places: Sequence[Int32Array]) -> Json:
        """What a reader must know to read these; they are held until `release`."""
        ...

    def read(self, remote: Json, places: Sequence[Int32Array], timeout_s: float) -> Future[int]:
        """Read what a peer's `describe` says into these places. The future brings the bytes that were moved, or a
        TransferError; it ends when nobody can write to them any more, some minutes behind the timeout at the latest.

        remote: the peer's word. Raises TransferError where it does not fit this memory.
        """
        ...

    def release(self, description: Json | None) -> None:
        """Nobody may read what was described so any more; None: nobody reads or writes anything, and the memories are
        forgotten. What is being read ends with a TransferError then; this blocks, and any thread may ask for it."""
        ...

    def close(self) -> None:
        """End everything, and wait until nobody writes to the memory. Idempotent."""
        ...


def ids_of(value: Any, count: int, most: int) -> list[int]:
    """The page ids of a peer's description. Raises TransferError unless there are `count` of them, from 1 to most."""
    good = isinstance(value, list) and all(type(item) is int for item in value)
    if not good or len(value) != count or not all(0 < page <= most for page in value):
        raise TransferError("mismatch", f"the peer names other pages than the {count} that were asked for")
    return value  # type: ignore[no-any-return]


def parse_networks(given: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Raises ValueError."""
    return tuple(ipaddress.ip_network(one) for one in given)
