"""Clients that leave, that read slowly, that wait long, and a server that is told to go."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from engine.config import StartupError
from engine.request import Request
from engine.scheduling.sequence import Sequence
from engine.stream import TokenStream
from tests.server.support import BOUND_S, Live, live, parse_events, served_model, text_of, until
from tests.server.test_errors import check_shape

COMPLETIONS = "/v1/completions"
LONG = served_model(max_model_len=20_000)


def http_post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextlib.asynccontextmanager
async def raw_client(server: Live, body: dict[str, Any]) -> AsyncIterator[socket.socket]:
    """A socket with a small receive buffer that has sent a request and reads nothing by itself."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        await loop.sock_sendall(sock, http_post(COMPLETIONS, body))
        yield sock
    finally:
        sock.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_its_pages_within_a_step(stream: bool, n: int) -> None:
    async with live(model=LONG, step_seconds=0.002) as server:
        body = {"prompt": [5] * 100, "max_tokens": 10_000, "stream": stream, "n": n}
        async with raw_client(server, body) as sock:
            await until(lambda: server.engine.stats().num_running == n)
            if stream:
                assert await asyncio.get_running_loop().sock_recv(sock, 100)
        await until(lambda: server.num_requests() == 0)
        waited = server.device.num_waited
        await server.all_free()
        # What was in flight at the moment of the abort ends; nothing new is launched.
        assert server.device.num_waited - waited <= 2


async def test_a_client_that_leaves_the_queue() -> None:
    async with live(model=LONG, max_num_seqs=1) as server:
        server.device.gate.clear()
        first = asyncio.create_task(server.complete("x", max_tokens=3))
        await until(lambda: server.engine.stats().num_running == 1)
        async with raw_client(server, {"prompt": "y", "max_tokens": 10_000}):
            await until(lambda: server.engine.stats().num_waiting == 1)
        await until(lambda: server.engine.stats().num_waiting == 0)
        server.device.gate.set()
        assert (await first)["usage"]["completion_tokens"] == 3
        await server.all_free()


async def test_a_hundred_clients_that_leave() -> None:
    async with live(model=LONG) as server:
        async with contextlib.AsyncExitStack() as stack:
            for index in range(100):
                body = {"prompt": [index + 3] * 30, "max_tokens": 10_000, "stream": bool(index % 2)}
                await stack.enter_async_context(raw_client(server, body))
            await until(lambda: server.num_requests() == 100)
        await server.all_free()
        assert (await server.complete("x", max_tokens=2))["usage"]["completion_tokens"] == 2


async def test_a_slow_reader_holds_up_nobody_and_loses_nothing() -> None:
    async with live(model=LONG) as server:
        body = {"prompt": [9] * 10, "max_tokens": 400, "seed": 1, "n": 64}
        # Chatty, so that no kernel's buffers can hold it all.
        streamed = body | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        loop = asyncio.get_running_loop()
        async with raw_client(server, streamed) as sock:
            # The engine ends although hardly anything was read: its deltas melt into one.
            await until(lambda: server.num_requests() == 64)
            async with asyncio.timeout(BOUND_S):
                await server.engine.drained()
            assert server.state.in_flight.count == 1, "the client was not slow enough"
            assert (await server.complete("x", max_tokens=2))["usage"]["completion_tokens"] == 2
            raw = b""
            # Reading through a window of 4 KiB would take ten seconds.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            async with asyncio.timeout(BOUND_S):
                while not raw.endswith(b"0\r\n\r\n"):
                    raw += await loop.sock_recv(sock, 65536)
        events = parse_events(unchunked(raw.partition(b"\r\n\r\n")[2]))
        assert events[-1] == "[DONE]"
        whole = await server.complete(**body)
        assert [text_of(events, index) for index in range(64)] == [choice["text"] for choice in whole["choices"]]


def unchunked(raw: bytes) -> bytes:
    """The body of a chunked transfer."""
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        body, raw = body + raw[:length], raw[length + 2 :]
    return body


@pytest.mark.parametrize("n", [1, 2])
async def test_keep_alive_comments_while_waiting(n: int) -> None:
    async with live(keep_alive_interval_s=0.02) as server:
        server.device.gate.clear()
        body = {"prompt": "x", "max_tokens": 3, "stream": True, "n": n}
        async with server.http.post(server.url + COMPLETIONS, json=body) as response:
            assert response.status == 200  # the headers came before any token
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            server.device.gate.set()
            rest = parse_events(await response.read())
        chunks = [event for event in rest if event != ": keep-alive"]
        assert chunks[-1] == "[DONE]" and len(chunks) >= 2
        assert sum(bool(chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]) == n


async def test_no_comment_when_tokens_come_in_time(server: Live) -> None:
    events = await server.events(COMPLETIONS, {"prompt": "x", "max_tokens": 50})
    assert not [event for event in events if isinstance(event, str) and event != "[DONE]"]


# ---- shutdown


async def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async with live(drain_timeout_s=20.0) as server:
        server.device.gate.clear()
        streamed = asyncio.create_task(server.events(COMPLETIONS, {"prompt": "x", "max_tokens": 30}))
        whole = asyncio.create_task(server.complete("y", max_tokens=30))
        await until(lambda: server.num_requests() == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: server.engine.draining)
        for path in ("/health", "/ready"):
            async with server.http.get(server.url + path) as response:
                check_shape(response.status, await response.json(), expected=503)
        async with server.http.post(server.url + COMPLETIONS, json={"prompt": "z"}) as response:
            error = check_shape(response.status, await response.json(), expected=503)
            assert error["code"] == "service_unavailable" and float(response.headers["Retry-After"]) > 0
        assert not server.serving.done()
        server.device.gate.set()
        events = await streamed
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        assert (await whole)["usage"]["completion_tokens"] == 30
        async with asyncio.timeout(BOUND_S):
            await server.serving
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", server.port)


async def test_drain_is_bounded_and_ends_streams_in_order() -> None:
    async with live(drain_timeout_s=0.4, model=LONG, step_seconds=0.002) as server:
        streamed = asyncio.create_task(server.events(COMPLETIONS, {"prompt": "x", "max_tokens": 19_000}))
        whole = asyncio.create_task(server.post(COMPLETIONS, {"prompt": "y", "max_tokens": 19_000}))
        await until(lambda: server.engine.stats().num_running == 2)
        server.stop.set()
        async with asyncio.timeout(BOUND_S):
            await server.serving
        events = await streamed
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "abort"
        check_shape(*await whole, expected=503)


async def test_a_second_signal_ends_the_drain() -> None:
    async with live(drain_timeout_s=30.0) as server:
        server.device.gate.clear()
        task = asyncio.create_task(server.events(COMPLETIONS, {"prompt": "x"}))
        await until(lambda: server.num_requests() == 1)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: server.engine.draining)
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(BOUND_S):
            await server.serving
        with pytest.raises(aiohttp.ClientError):
            await task


async def test_a_port_in_use_is_one_line() -> None:
    async with live() as server:
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            async with live(port=server.port):
                pass


async def test_sigterm_ends_the_process_in_time_although_a_client_never_reads() -> None:
    program = textwrap.dedent("""
        import uvloop
        from tests.server.support import live, served_model

        async def main() -> None:
            model = served_model(max_model_len=20_000)
            async with live(model=model, drain_timeout_s=1.0) as server:
                print(server.port, flush=True)
                await server.serving

        uvloop.run(main())
    """)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(BOUND_S):
            port = int(await process.stdout.readline())
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(http_post(COMPLETIONS, {"prompt": "x", "max_tokens": 19_000, "stream": True, "n": 8}))
            assert sock.recv(10)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(BOUND_S):
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_client_leaves_goes_without_the_collector(stream: bool) -> None:
    """Answers that ended and ones that nobody waited for: else prompts and answers stay until everything is gone
    through, which a server that is never idle does seldom."""
    body = {"prompt": "hello", "max_tokens": 6, "n": 2, "stream": stream}

    async def ask(server: Live) -> None:
        chat = body | {"messages": [{"role": "user", "content": "hello"}]}
        for path, given in ((COMPLETIONS, body), ("/v1/chat/completions", chat)):
            async with server.http.post(server.url + path, json=given) as response:
                assert response.status == 200
                await response.read()
        async with raw_client(server, body | {"max_tokens": 10_000}) as sock:
            await until(lambda: server.engine.stats().num_running == 2)
            if stream:
                assert await asyncio.get_running_loop().sock_recv(sock, 100)
        await server.all_free()

    async with live(model=LONG, step_seconds=0.002) as server:
        await ask(server)  # what the first requests leave is made once
        gc.collect()
        gc.disable()
        try:
            others = set(map(id, gc.get_objects()))
            await ask(server)
            kinds = Request | TokenStream | Sequence
            # The server sees a moment after the last answer that its client is gone.
            await until(lambda: not [1 for one in gc.get_objects() if isinstance(one, kinds) and id(one) not in others])
        finally:
            gc.enable()
