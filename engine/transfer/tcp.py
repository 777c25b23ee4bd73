"""TcpConnector: pages over plain TCP connections, for servers without NIXL. Works wherever the pages lie.

Blocking sockets in threads beside the loop. A reader sends the ticket that it was given and the bytes that it expects
of a page; then the pages come, one after the other.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine.config import StartupError, TransferOptions
from engine.executor.base import PageMemory
from engine.forward import Int32Array
from engine.transfer.base import Json, TransferError, parse_networks
from engine.transfer.wire import Network, family_of, is_allowed

# Sent at a time: what is copied stays in a cache, and a decode step is not kept waiting for long.
CHUNK_BYTES = 1024 * 1024
MAX_READERS = 32
MAX_READS = 4
_TICKET_BYTES = 32
_HELLO = struct.Struct(f">4s{_TICKET_BYTES}sQ")
_MAGIC = b"1LKV"
_IDLE_S = 10.0


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
        self._memory: PageMemory | None = None
        # By ticket: pages that may be read, until they are released.
        self._offers: dict[bytes, Int32Array] = {}
        self._places = threading.BoundedSemaphore(MAX_READERS)
        self._closed = False
        self._reads = ThreadPoolExecutor(MAX_READS, "kv-read")
        self._thread = threading.Thread(target=self._listen, name="kv-listen", daemon=True)
        self._thread.start()

    def register(self, memory: PageMemory) -> None:
        """See Connector."""
        self._memory = memory

    def describe(self, pages: Int32Array) -> Json:
        """See Connector."""
        assert self._memory is not None
        ticket = secrets.token_bytes(_TICKET_BYTES)
        self._offers[ticket] = pages.copy()
        host, port = self._listener.getsockname()[:2]
        return {
            "host": host,
            "port": port,
            "ticket": ticket.hex(),
            "count": len(pages),
            "page_bytes": self._memory.page_bytes,
        }

    def release(self, description: Json | None) -> None:
        """See Connector."""
        if description is None:
            self._offers.clear()
            self._memory = None
        else:
            self._offers.pop(bytes.fromhex(description["ticket"]), None)

    def read(self, remote: Json, pages: Int32Array, timeout_s: float) -> Future[int]:
        """See Connector."""
        memory = self._memory
        if memory is None or self._closed:
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
        if remote.get("count") != len(pages) or remote.get("page_bytes") != memory.page_bytes:
            raise TransferError("mismatch", f"the peer's pages are not the {len(pages)} that were asked for")
        ends_at = time.monotonic() + timeout_s
        return self._reads.submit(self._read, (host, port), key, memory, pages.copy(), ends_at)

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

    def _read(self, address: tuple[str, int], key: bytes, memory: PageMemory, pages: Int32Array, ends_at: float) -> int:
        at_once = max(1, CHUNK_BYTES // memory.page_bytes)
        buffer = np.empty((min(at_once, len(pages)), memory.page_bytes), np.uint8)
        try:
            with socket.create_connection(address, _left(ends_at)) as peer:
                peer.sendall(_HELLO.pack(_MAGIC, key, memory.page_bytes))
                for start in range(0, len(pages), at_once):
                    some = pages[start : start + at_once]
                    into = buffer[: len(some)].reshape(-1).data
                    done = 0
                    while done < len(into):
                        if self._closed:
                            raise TransferError("resting", "this server is shutting down")
                        peer.settimeout(min(_left(ends_at), 1.0))
                        try:
                            count = peer.recv_into(into[done:])
                        except TimeoutError:
                            continue
                        if not count:
                            raise TransferError("transfer", "the peer hung up amid its pages")
                        done += count
                    memory.copy_in(some, buffer[: len(some)])
        except OSError as error:
            raise TransferError("transfer", f"its pages did not come ({error.strerror or error})") from None
        return len(pages) * memory.page_bytes

    def _listen(self) -> None:
        while not self._closed:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                time.sleep(0.1)  # it is closed, or there are too many open files
                continue
            if not self._places.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self._send, args=(peer,), name="kv-send", daemon=True).start()

    def _send(self, peer: socket.socket) -> None:
        """Whatever goes wrong ends the connection, which tells the reader."""
        try:
            with peer, contextlib.suppress(OSError):
                peer.settimeout(_IDLE_S)
                hello = b""
                while len(hello) < _HELLO.size:
                    more = peer.recv(_HELLO.size - len(hello))
                    if not more:
                        return
                    hello += more
                magic, key, page_bytes = _HELLO.unpack(hello)
                pages, memory = self._offers.get(key), self._memory
                if magic != _MAGIC or pages is None or memory is None or page_bytes != memory.page_bytes:
                    return
                at_once = max(1, CHUNK_BYTES // page_bytes)
                buffer = np.empty((min(at_once, len(pages)), page_bytes), np.uint8)
                for start in range(0, len(pages), at_once):
                    some = pages[start : start + at_once]
                    # What was released is somebody else's by now.
                    if key not in self._offers or self._memory is not memory:
                        return
                    memory.copy_out(some, buffer[: len(some)])
                    peer.sendall(buffer[: len(some)].reshape(-1).data)
        finally:
            self._places.release()


def _left(ends_at: float) -> float:
    left = ends_at - time.monotonic()
    if left <= 0:
        raise TransferError("timeout", "its pages did not come in time")
    return left
