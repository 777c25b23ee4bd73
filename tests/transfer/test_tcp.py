"""The data port: who says nothing keeps nobody out, and nothing waits for a peer that does not answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from engine.config import TransferOptions
from engine.executor.host_pages import HostPages
from engine.transfer import tcp
from engine.transfer.base import Json, TransferError, parse_networks
from engine.transfer.tcp import TcpConnector

# Ends what hangs.
BOUND_S = 60.0
PLACES = [np.array([1, 3], np.int32)]


def pages(fill: int) -> tuple[HostPages, np.ndarray]:
    memory = np.full((8, 4096), fill, np.uint8)
    return HostPages([memory], "pages"), memory


@contextlib.contextmanager
def connector(fill: int) -> Iterator[tuple[TcpConnector, np.ndarray]]:
    made = TcpConnector("127.0.0.1", 0, parse_networks(TransferOptions("TcpConnector").peers))
    host_pages, memory = pages(fill)
    made.register([host_pages])
    try:
        yield made, memory
    finally:
        made.close()


@contextlib.contextmanager
def strangers(described: Json, count: int, source: str) -> Iterator[list[socket.socket]]:
    """Connections to its data port that say half a hello."""
    with contextlib.ExitStack() as stack:
        address = (described["host"], described["port"])
        sockets = [
            stack.enter_context(socket.create_connection(address, source_address=(source, 0))) for _ in range(count)
        ]
        for one in sockets:
            one.sendall(b"2L")
        yield sockets


def has_hung_up(peer: socket.socket) -> bool:
    peer.settimeout(BOUND_S)
    try:
        return not peer.recv(1)
    except ConnectionError:
        return True


def test_who_says_nothing_keeps_no_reader_out() -> None:
    with connector(7) as (prefill, _), connector(0) as (decode, memory):
        described = prefill.describe(PLACES)
        with contextlib.ExitStack() as stack:
            for number in (2, 3, 4):
                stack.enter_context(strangers(described, tcp.MAX_READERS, f"127.0.0.{number}"))
            assert decode.read(described, PLACES, 20.0).result(BOUND_S) == 2 * 4096
        assert (memory[[1, 3]] == 7).all() and not memory[[0, 2, 4, 5, 6, 7]].any()


def test_an_address_has_few_places_until_it_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HELLO_S", 1e6)
    with connector(7) as (prefill, _), connector(0) as (decode, _):
        described = prefill.describe(PLACES)
        with strangers(described, tcp.MAX_STRANGERS_OF_ADDRESS, "127.0.0.1") as waiting:
            with strangers(described, 3, "127.0.0.1") as more:
                assert all(map(has_hung_up, more))
            with pytest.raises(TransferError) as error:
                decode.read(described, PLACES, 20.0).result(BOUND_S)
            assert error.value.reason == "transfer"
            # Whoever goes makes room.
            waiting.pop().close()
            while prefill._strangers.total() == tcp.MAX_STRANGERS_OF_ADDRESS:
                time.sleep(0.01)
            assert decode.read(described, PLACES, 20.0).result(BOUND_S) == 2 * 4096


def test_a_hello_that_drips_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte in time, the whole of it never."""
    monkeypatch.setattr(tcp, "HELLO_S", 0.3)
    with connector(7) as (prefill, _):
        with strangers(prefill.describe(PLACES), 1, "127.0.0.1") as [peer], pytest.raises(OSError):
            for _ in range(tcp._HELLO.size - 3):
                peer.sendall(b"L")
                time.sleep(0.05)
            peer.sendall(b"L")
            raise AssertionError("it listened all the while")
        while prefill._strangers:
            time.sleep(0.01)


def full() -> tuple[socket.socket, list[socket.socket]]:
    """A listener whose queue is full: whoever connects waits."""
    listener, waiting = socket.create_server(("127.0.0.1", 0), backlog=0), []
    for _ in range(2):
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(listener.getsockname())
    return listener, waiting


@pytest.mark.parametrize("how", ["release", "close"])
@pytest.mark.parametrize("kind", ["connects for ever", "says nothing"])
def test_a_peer_that_does_not_answer_holds_nothing_up(how: str, kind: str) -> None:
    listener, waiting = full() if kind == "connects for ever" else (socket.create_server(("127.0.0.1", 0)), [])
    with connector(0) as (decode, memory):
        described = decode.describe(PLACES) | {"port": listener.getsockname()[1]}
        future = decode.read(described, PLACES, 3600.0)
        end = threading.Thread(target=decode.close if how == "close" else lambda: decode.release(None), daemon=True)
        while not future.running():
            time.sleep(0.01)
        end.start()
        end.join(BOUND_S)
        assert not end.is_alive()
        with pytest.raises(TransferError) as error:
            future.result(BOUND_S)
        assert error.value.reason == "resting" and not memory.any()
    for one in (listener, *waiting):
        one.close()
