"""TcpConnector: pages over plain TCP connections, for servers without NIXL. Works wherever the pages lie.

Blocking sockets in threads beside the loop. A reader sends the ticket that it was given and the bytes that it expects;
then the pages come, one after the other, and the states after them. Who has not said so yet has little time, and few
places per address, which are none of the readers'.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from engine.addresses import household
from engine.config import StartupError, TransferOptions
from engine.executor.base import DeviceMemory, PageMemory
from engine.forward import Int32Array
from engine.transfer.base import Json, TransferError, parse_networks
from engine.transfer.wire import Network, family_of, is_allowed

# Sent at a time: what is copied stays in a cache, and a decode step is not kept waiting for long.
CHUNK_BYTES = 1024 * 1024
MAX_READERS = 32
MAX_READS = 4
# Connections that have yet to say what they want: of all, and of an address, whose servers say it at once.
MAX_STRANGERS = 128
MAX_STRANGERS_OF_ADDRESS = 16
HELLO_S = 5.0
_TICKET_BYTES = 32
_HELLO = struct.Struct(f">4s{_TICKET_BYTES}sQ")
_MAGIC = b"2LKV"
_IDLE_S = 10.0
# Between two looks at whether a read is to end.
_LOOK_S = 0.5
Row = npt.NDArray[np.uint8]


def make(options: TransferOptions) -> TcpConnector:
    return TcpConnector(options.host, options.data_port, parse_networks(options.peers))


class TcpConnector:
    """A Connector. host, port: where it listens for readers. Raises StartupError where it cannot. networks: where it
    reads from."""

    def __init__(self, host: str, port: int, networks: tuple[Network, ...]) -> None:
        try:
            self._listener = socket.create_server((host, port), family=family_of(host), backlog=MAX_READERS)
        except OSError as error:
            raise StartupError(f"--kv-transfer-config: {host}:{port}: {error.strerror or error}") from None
        self._networks = networks
        self._memories: Sequence[PageMemory] = ()
        # By ticket: what may be read, until it is released.
        self._offers: dict[bytes, list[Int32Array]] = {}
        self._untouched = threading.Condition()
        self._num_touching = 0
        self._places = threading.BoundedSemaphore(MAX_READERS)
        self._strangers: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._closed = False
        self._reads = ThreadPoolExecutor(MAX_READS, "kv-read")
        self._thread = threading.Thread(target=self._listen, name="kv-listen", daemon=True)
        self._thread.start()

    def register(self, memories: Sequence[PageMemory]) -> None:
        """See Connector."""
        self._memories = tuple(memories)

    def describe(self, places: Sequence[Int32Array]) -> Json:
        """See Connector."""
        assert self._memories
        ticket = secrets.token_bytes(_TICKET_BYTES)
        self._offers[ticket] = [one.copy() for one in places]
        host, port = self._listener.getsockname()[:2]
        return {
            "host": host,
            "port": port,
            "ticket": ticket.hex(),
            "counts": list(map(len, places)),
            "page_bytes": [memory.page_bytes for memory in self._memories],
        }

    def release(self, description: Json | None) -> None:
        """See Connector."""
        if description is None:
            self._offers.clear()
            self._memories = ()
            with self._untouched:
                # Of what is being copied just now.
                self._untouched.wait_for(lambda: not self._num_touching)
        else:
            self._offers.pop(bytes.fromhex(description["ticket"]), None)

    def read(self, remote: Json, places: Sequence[Int32Array], timeout_s: float) -> Future[int]:
        """See Connector."""
        memories = self._memories
        if not memories or self._closed:
            raise TransferError("resting", "this server's memory is away")
        host, port, ticket = remote.get("host"), remote.get("port"), remote.get("ticket")
        try:
            key = bytes.fromhex(ticket) if isinstance(ticket, str) else b""
        except ValueError:
            key = b""
        if not isinstance(host, str) or type(port) is not int or not 0 < port < 65536 or len(key) != _TICKET_BYTES:
            raise TransferError("mismatch", "the peer does not say where its pages are")
        if not is_allowed(host, self._networks):
            raise TransferError("peer", "its address is in none of the networks of kv_connector_extra_config.peers")
        sizes = [memory.page_bytes for memory in memories]
        if remote.get("counts") != list(map(len, places)) or remote.get("page_bytes") != sizes:
            raise TransferError("mismatch", f"the peer's pages are not the {len(places[0])} that were asked for")
        ends_at = time.monotonic() + timeout_s
        return self._reads.submit(self._read, (host, port), key, memories, [one.copy() for one in places], ends_at)

    def close(self) -> None:
        """See Connector."""
        self._closed = True
        self._offers.clear()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._reads.shutdown(cancel_futures=True)

    # ---- threads

    @contextlib.contextmanager
    def _touching(self) -> Iterator[None]:
        """The memory stays where it is meanwhile."""
        with self._untouched:
            self._num_touching += 1
        try:
            yield
        finally:
            with self._untouched:
                self._num_touching -= 1
                self._untouched.notify_all()

    def _read(
        self,
        address: tuple[str, int],
        key: bytes,
        memories: Sequence[PageMemory],
        places: Sequence[Int32Array],
        ends_at: float,
    ) -> int:
        parts = list(zip(memories, places, strict=True))
        total = _num_bytes(parts)
        try:
            with self._connect(address, memories, ends_at) as peer:
                peer.sendall(_HELLO.pack(_MAGIC, key, total))
                for memory, some, buffer in _chunks(parts):
                    into = buffer.reshape(-1).data
                    done = 0
                    while done < len(into):
                        peer.settimeout(self._patience(memories, ends_at))
                        try:
                            count = peer.recv_into(into[done:])
                        except TimeoutError:
                            continue
                        if not count:
                            raise TransferError("transfer", "the peer hung up amid its pages")
                        done += count
                    with self._touching():
                        self._patience(memories, ends_at)
                        memory.copy_in(some, buffer)
        except OSError as error:
            raise TransferError("transfer", f"its pages did not come ({error.strerror or error})") from None
        return total

    def _connect(self, address: tuple[str, int], memories: Sequence[PageMemory], ends_at: float) -> socket.socket:
        """Raises OSError, and what _patience does."""
        family, kind, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        peer = socket.socket(family, kind)
        try:
            peer.setblocking(False)
            failed = peer.connect_ex(where)
            if failed == errno.EINPROGRESS:
                poll = select.poll()
                poll.register(peer, select.POLLOUT)
                while not poll.poll(math.ceil(1000 * self._patience(memories, ends_at))):
                    pass
                failed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, os.strerror(failed))
            peer.settimeout(self._patience(memories, ends_at))
        except BaseException:
            peer.close()
            raise
        return peer

    def _patience(self, memories: Sequence[PageMemory], ends_at: float) -> float:
        """Seconds until one looks again at whether a read into these goes on. Raises TransferError if it does not."""
        if self._closed or self._memories is not memories:
            raise TransferError("resting", "this server's memory is away")
        left = ends_at - time.monotonic()
        if left <= 0:
            raise TransferError("timeout", "its pages did not come in time")
        return min(left, _LOOK_S)

    def _listen(self) -> None:
        while not self._closed:
            try:
                peer, address = self._listener.accept()
            except OSError:
                time.sleep(0.1)  # it is closed, or there are too many open files
                continue
            house = household(address[0])
            if not self._has_place(house):
                peer.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(peer, house), name="kv-send", daemon=True).start()
            except RuntimeError:  # there are too many threads
                self._is_known(house)
                peer.close()

    def _has_place(self, address: str) -> bool:
        """For somebody who has yet to say what it wants. A place is given back by `_is_known`."""
        with self._counting:
            if self._strangers.total() >= MAX_STRANGERS or self._strangers[address] >= MAX_STRANGERS_OF_ADDRESS:
                return False
            self._strangers[address] += 1
            return True

    def _is_known(self, address: str) -> None:
        with self._counting:
            self._strangers[address] -= 1
            if not self._strangers[address]:
                del self._strangers[address]

    def _serve(self, peer: socket.socket, address: str) -> None:
        """Whatever goes wrong ends the connection, which tells the reader."""
        with peer, contextlib.suppress(OSError):
            try:
                hello = _hear(peer)
            finally:
                self._is_known(address)
            magic, key, total = _HELLO.unpack(hello)
            places, memories = self._offers.get(key), self._memories
            if magic != _MAGIC or places is None or not memories:
                return
            parts = list(zip(memories, places, strict=True))
            if total == _num_bytes(parts) and self._places.acquire(blocking=False):
                try:
                    self._send(peer, key, memories, parts)
                finally:
                    self._places.release()

    def _send(
        self,
        peer: socket.socket,
        key: bytes,
        memories: Sequence[PageMemory],
        parts: Sequence[tuple[PageMemory, Int32Array]],
    ) -> None:
        peer.settimeout(_IDLE_S)
        for memory, some, buffer in _chunks(parts):
            with self._touching():
                # What was released is somebody else's by now.
                if key not in self._offers or self._memories is not memories:
                    return
                memory.copy_out(some, buffer)
            peer.sendall(buffer.reshape(-1).data)


def _hear(peer: socket.socket) -> bytes:
    """A whole hello. Raises OSError where it does not come in time."""
    hello, ends_at = b"", time.monotonic() + HELLO_S
    while len(hello) < _HELLO.size:
        if (left := ends_at - time.monotonic()) <= 0:
            raise TimeoutError
        peer.settimeout(left)
        more = peer.recv(_HELLO.size - len(hello))
        if not more:
            raise ConnectionError
        hello += more
    return hello


def _num_bytes(parts: Sequence[tuple[PageMemory, Int32Array]]) -> int:
    return sum([len(places) * memory.page_bytes for memory, places in parts])


def _chunks(parts: Sequence[tuple[PageMemory, Int32Array]]) -> Iterator[tuple[PageMemory, Int32Array, Row]]:
    """What is sent at a time: of which memory, which places, and room for their bytes, uint8 [places, page_bytes]."""
    for memory, places in parts:
        at_once = max(1, CHUNK_BYTES // memory.page_bytes)
        if isinstance(memory, DeviceMemory):
            at_once = memory.rows_at_once
        buffer = np.empty((min(at_once, len(places)), memory.page_bytes), np.uint8)
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            yield memory, some, buffer[: len(some)]
