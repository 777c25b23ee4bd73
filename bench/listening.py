"""Many streams read cheaply: raw sockets, no HTTP library, one read and one count an event.

A process of its own (`bench.http` starts some). Speaks JSON lines as bench/front.py does: "begin" and "end" on the
standard input open and close the time that is counted; its end closes the streams.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

import numpy as np

# Every event ends in a blank line; a chunk's own ends do not look like that.
EVENT_END = b"\n\n"
HEAD_END = b"\r\n\r\n"


class Listener:
    """One stream. Gaps are seconds between reads that brought events."""

    __slots__ = ("bytes", "events", "gaps", "head", "last", "socket")

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(request)
        self.head = b""
        self.last = 0.0
        self.events = self.bytes = 0
        self.gaps: list[float] = []

    def read(self, now: float, counts: bool) -> bool:
        """False when the stream has ended."""
        data = self.socket.recv(1 << 18)
        if not data:
            return False
        if not self.head.endswith(HEAD_END):
            head, end, data = (self.head + data).partition(HEAD_END)
            self.head = head + end
            if not self.head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {self.head[:300]!r} {data[:300]!r}")
        if counts and (events := data.count(EVENT_END)):
            self.events += events
            self.bytes += len(data)
            if self.last:
                self.gaps.append(now - self.last)
            self.last = now
        return True


def request_of(path: str, body: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def main() -> None:
    port, count, path, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    request = request_of(path, body)
    poller = select.epoll()
    control = sys.stdin.fileno()
    poller.register(control, select.EPOLLIN)
    listeners: dict[int, Listener] = {}
    for _ in range(count):
        one = Listener(port, request)
        listeners[one.socket.fileno()] = one
        poller.register(one.socket.fileno(), select.EPOLLIN)
    counts = ended = False
    while True:
        for file, _ in poller.poll():
            if file != control:
                if not listeners[file].read(time.perf_counter(), counts):
                    poller.unregister(file)
                    ended = True
                continue
            word = os.read(control, 4096).decode()
            if not word:
                return
            counts = "begin" in word
            if "end" in word:
                gaps = np.array([gap for one in listeners.values() for gap in one.gaps] or [0.0])
                line = {
                    "events": sum(one.events for one in listeners.values()),
                    "bytes": sum(one.bytes for one in listeners.values()),
                    "gaps": np.percentile(gaps, [50, 99, 100]).tolist(),
                    "ended": ended,
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
