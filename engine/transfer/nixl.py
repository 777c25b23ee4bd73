"""NixlConnector: pages by NIXL (pip install nixl), which reads them out of the peer's memory by what there is between
the two: RDMA, shared memory of one machine, or TCP (UCX_TLS, UCX_NET_DEVICES say which).

One thread starts transfers and asks after them. One that never ends (its peer has stopped) cannot be called off: NIXL
forgets a handle, but what the peer answers later is written all the same. Nobody writes any more when the agent that
started it is gone, so then there is a new one, on which all others begin their piece again.

A peer that can reach this agent can read all of the KV memory, so the
networks between servers must be trusted, as for every user of NIXL.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import importlib
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import StartupError, TransferOptions
from engine.executor.base import PageMemory
from engine.forward import Int32Array
from engine.transfer.base import Json, TransferError, ids_of

logger = logging.getLogger("oneloop.transfer")

MAX_AGENTS = 64
MAX_METADATA = 256 * 1024
# Between two questions after running transfers.
POLL_S = 0.001
# Behind its time, until when the pages of a transfer that does not end are kept for it. Then it is given up, which its
# peer may not survive.
LATE_S = 300.0
# What runs when the memory goes, or this server ends, has so long for the piece that it is at.
END_S = 5.0
# Bytes of one transfer: what is copied at once by this process holds a core for some milliseconds.
PIECE_BYTES = 16 * 1024 * 1024
_MEMORY = "DRAM"


def make(options: TransferOptions) -> NixlConnector:
    try:
        api: Any = importlib.import_module("nixl._api")
    except ImportError as error:
        raise StartupError(f"--kv-transfer-config: NixlConnector needs {error.name}: pip install nixl") from None

    def make_agent() -> Any:
        name = f"oneloop-{secrets.token_hex(8)}"
        return api.nixl_agent(name, api.nixl_agent_config(backends=list(options.backends)))

    try:
        return NixlConnector(make_agent)
    except Exception as error:
        backends = ", ".join(options.backends)
        raise StartupError(f"--kv-transfer-config: NIXL has no {backends} here ({error})") from None


@dataclass(slots=True, eq=False)
class _Read:
    """pieces: (local, remote) descriptors of transfers that have not ended. handle: of the first, where it runs."""

    metadata: bytes
    pieces: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]
    num_bytes: int
    ends_at: float
    future: Future[int]
    agent: str = ""
    handle: Any = None


class NixlConnector:
    """A Connector. make_agent: a nixl_agent, which the thread alone calls. Raises what make_agent does."""

    def __init__(self, make_agent: Callable[[], Any]) -> None:
        self._make_agent = make_agent
        self._agent: Any = make_agent()
        self._registered: Any = None
        # Of each memory.
        self._regions: list[list[tuple[int, int, int]]] = []
        self._metadata = ""
        # Of peers, by a hash of their metadata: the least recently used goes.
        self._agents: OrderedDict[bytes, str] = OrderedDict()
        self._inbox: queue.SimpleQueue[Callable[[], None] | _Read | None] = queue.SimpleQueue()
        self._running: list[_Read] = []
        self._closed = False
        # Nothing is put into the inbox behind its end: nobody would answer.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="nixl", daemon=True)
        self._thread.start()

    def register(self, memories: Sequence[PageMemory]) -> None:
        """See Connector."""

        def run() -> None:
            self._regions = [memory.regions() for memory in memories]
            self._introduce()

        try:
            self._on_thread(run)
        except StartupError as error:
            raise StartupError(f"--kv-transfer-config: NixlConnector: {error}") from None
        except Exception as error:
            raise StartupError(f"--kv-transfer-config: NIXL cannot have the KV memory ({error})") from None

    def describe(self, places: Sequence[Int32Array]) -> Json:
        """See Connector."""
        regions = [[list(region) for region in of_one] for of_one in self._regions]
        return {"agent": self._metadata, "regions": regions, "places": [one.tolist() for one in places]}

    def release(self, description: Json | None) -> None:
        """See Connector. Of single pages nothing is to be done: a reader asks whether they were held."""
        if description is not None or self._registered is None:
            return
        if self._closed:
            self._thread.join()
            return

        def run() -> None:
            self._regions = []
            self._let_end()
            if self._running:
                self._renew(TransferError("resting", "this server's memory is away"))
            else:
                self._agent.deregister_memory(self._registered)
                self._registered, self._metadata = None, ""

        self._on_thread(run)

    def read(self, remote: Json, places: Sequence[Int32Array], timeout_s: float) -> Future[int]:
        """See Connector."""
        ours = self._regions  # the thread may put others in their place
        if not ours:
            raise TransferError("resting", "this server's memory is away")
        regions, theirs = remote.get("regions"), remote.get("places")
        count = len(ours)
        if not all(isinstance(one, list) and len(one) == count for one in (regions, theirs)):
            raise TransferError("mismatch", "the peer's memory has other parts")
        assert isinstance(regions, list) and isinstance(theirs, list)
        pieces, num_bytes = [], 0
        for own, of_one, ids, mine in zip(ours, regions, theirs, places, strict=True):
            some, size = _pieces(own, mine, of_one, ids)
            pieces += some
            num_bytes += size
        given = remote.get("agent")
        try:
            metadata = base64.b64decode(given, validate=True) if isinstance(given, str) else b""
        except (binascii.Error, ValueError):
            metadata = b""
        if not 0 < len(metadata) <= MAX_METADATA:
            raise TransferError("mismatch", "the peer does not say how it is reached")
        read = _Read(metadata, pieces, num_bytes, time.monotonic() + timeout_s, Future())
        self._put(read)
        return read.future

    def close(self) -> None:
        """See Connector."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _put(self, item: Callable[[], None] | _Read) -> None:
        with self._lock:
            if self._closed:
                raise TransferError("resting", "this server is shutting down")
            self._inbox.put(item)

    def _on_thread(self, work: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._put(run)
        done.result()

    # ---- the thread

    def _work(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=POLL_S) if self._running else self._inbox.get()
            except queue.Empty:
                pass
            else:
                if item is None:
                    break
                if isinstance(item, _Read):
                    self._running.append(item)
                else:
                    item()
            self._running = [read for read in self._running if not self._advance(read)]
            if any(time.monotonic() > read.ends_at + LATE_S for read in self._running):
                self._renew(None)
        self._regions = []
        self._let_end()
        self._drop_agent()
        for read in self._running:
            read.future.set_exception(TransferError("resting", "this server is shutting down"))

    def _let_end(self) -> None:
        """Wait a little for the pieces that run; without regions none begins."""
        ends_at = time.monotonic() + END_S
        while self._running and time.monotonic() < ends_at:
            self._running = [read for read in self._running if not self._advance(read)]
            time.sleep(POLL_S)

    def _introduce(self) -> None:
        """Tell the agent of the memory, and peers of the agent. Raises what NIXL and make_agent do."""
        if self._agent is None:
            self._agent = self._make_agent()
        regions = itertools.chain.from_iterable(self._regions)
        whole = [(address, size * pages, 0, "") for address, size, pages in regions]
        self._registered = self._agent.register_memory(whole, _MEMORY)
        self._metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()

    def _drop_agent(self) -> None:
        """Nobody can write to the memory from here on. What NIXL says to it changes nothing about that."""
        for read in self._running:
            if read.handle is not None:
                with contextlib.suppress(Exception):
                    self._agent.release_xfer_handle(read.handle)
                read.handle, read.agent = None, ""
        if self._registered is not None:
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(self._registered)
        self._agents.clear()
        self._registered, self._metadata, self._agent = None, "", None

    def _renew(self, error: TransferError | None) -> None:
        """Another agent in the place of one whose transfers do not end. error: what all of them end with; None: those
        that are late by a timeout, and the others begin their piece again."""
        now = time.monotonic()
        self._drop_agent()
        ended = [read for read in self._running if error is not None or now > read.ends_at]
        try:
            if self._regions:
                self._introduce()
        except Exception as failure:
            logger.error("NIXL has no other agent (%s): no pages are read until the memory is another", failure)
            self._regions, ended = [], self._running
        logger.warning("NIXL: %d transfers did not end, so that their agent does", len(ended))
        self._running = [read for read in self._running if read not in ended]
        for read in ended:
            read.future.set_exception(error or TransferError("timeout", "its pages did not come in time"))

    def _advance(self, read: _Read) -> bool:
        """Start its next transfer, or see how the last one does. Whether the read has ended."""
        try:
            if read.handle is None:
                return self._start(read)
            state = self._agent.check_xfer_state(read.handle)
            if state == "PROC":
                return False  # also when its time is over: somebody writes to the pages yet
            self._agent.release_xfer_handle(read.handle)
            read.handle = None
            if state != "DONE":
                raise TransferError("transfer", f"NIXL says {state}")
            del read.pieces[0]
            return self._start(read)
        except TransferError as error:
            self._end(read, error)
        except Exception as error:
            if read.handle is not None:
                try:
                    self._agent.release_xfer_handle(read.handle)
                except Exception:
                    return False  # somebody may write to the pages yet: once it is late its agent ends
                read.handle = None
            self._end(read, TransferError("transfer", f"NIXL says {type(error).__name__}: {str(error)[:200]}"))
        return True

    def _start(self, read: _Read) -> bool:
        if not read.pieces:
            read.future.set_result(read.num_bytes)
            return True
        if not self._regions:
            raise TransferError("resting", "this server's memory is away")
        if time.monotonic() > read.ends_at:
            raise TransferError("timeout", "its pages did not come in time")
        read.agent = read.agent or self._agent_of(read.metadata)
        mine, theirs = (self._agent.get_xfer_descs(one, _MEMORY) for one in read.pieces[0])
        read.handle = self._agent.initialize_xfer("READ", mine, theirs, read.agent)
        if self._agent.transfer(read.handle) == "ERR":
            self._agent.release_xfer_handle(read.handle)
            read.handle = None
            raise TransferError("transfer", "NIXL could not start it")
        return False

    def _end(self, read: _Read, error: TransferError) -> None:
        # The peer may come back under the same name with other memory.
        self._forget(hashlib.sha256(read.metadata).digest())
        read.future.set_exception(error)

    def _agent_of(self, metadata: bytes) -> str:
        key = hashlib.sha256(metadata).digest()
        if key in self._agents:
            self._agents.move_to_end(key)
            return self._agents[key]
        if len(self._agents) >= MAX_AGENTS:
            self._forget(next(iter(self._agents)))
        name = self._agent.add_remote_agent(metadata)
        self._agents[key] = name if isinstance(name, str) else name.decode()
        return self._agents[key]

    def _forget(self, key: bytes) -> None:
        name = self._agents.pop(key, None)
        if name is not None and not any(read.agent == name and read.handle is not None for read in self._running):
            try:
                self._agent.remove_remote_agent(name)
            except Exception as error:
                logger.debug("NIXL keeps the agent %s: %s", name, error)


def _pieces(
    regions: list[tuple[int, int, int]], places: Int32Array, others: Any, ids: Any
) -> tuple[list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]], int]:
    """(local, remote) descriptors of what is read from a peer's memory into places of one of these regions; and bytes.

    others, ids: the peer's word. Raises TransferError.
    """
    good = isinstance(others, list) and len(others) == len(regions)
    if not good or not all(map(_is_region, others or [])):
        raise TransferError("mismatch", "the peer's memory has other parts")
    if [region[1] for region in others] != [size for _, size, _ in regions]:
        raise TransferError("mismatch", "the peer's pages have other sizes")
    theirs = np.array(ids_of(ids, len(places), min(region[2] for region in others) - 1), np.uint64)
    own, page_bytes = places.astype(np.uint64), sum([size for _, size, _ in regions])
    at_once = max(1, PIECE_BYTES // page_bytes)
    pieces = []
    for start in range(0, len(places), at_once):
        some = slice(start, start + at_once)
        mine = _descriptors([(address, size) for address, size, _ in regions], own[some])
        pieces.append((mine, _descriptors([(address, size) for address, size, _ in others], theirs[some])))
    return pieces, len(places) * page_bytes


def _is_region(value: Any) -> bool:
    """(address of page 0, bytes of a page, pages)"""
    good = isinstance(value, list) and len(value) == 3 and all(type(item) is int for item in value)
    return good and 0 < value[0] < 2**63 and 0 < value[1] < 2**32 and 1 < value[2] < 2**31


def _descriptors(parts: list[tuple[int, int]], pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """uint64 [parts * pages, 3]: address, bytes, device."""
    rows = np.zeros((len(parts), len(pages), 3), np.uint64)
    for row, (address, size) in zip(rows, parts, strict=True):
        row[:, 0] = np.uint64(address) + pages * np.uint64(size)
        row[:, 1] = size
    return rows.reshape(-1, 3)
