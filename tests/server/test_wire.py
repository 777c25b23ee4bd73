"""Streams as bytes on the wire: chunks, HTTP/1.0, connections that are kept, and clients that do not read."""

from __future__ import annotations

import asyncio
import json

from tests.server.support import BOUND_S, Live, live, parse_events, text_of, until

BODY = {"prompt": "hello", "max_tokens": 12, "stream": True, "ignore_eos": True, "temperature": 0}


def request(version: str, body: dict[str, object], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST /v1/completions HTTP/{version}", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def unchunked(body: bytes) -> tuple[list[bytes], bytes]:
    """The chunks up to the one that ends the body, and what is behind it."""
    chunks = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        chunk, body = rest[:length], rest[length + 2 :]
        if not length:
            return chunks, body
        chunks.append(chunk)


async def exchange(server: Live, data: bytes) -> tuple[bytes, bytes]:
    """Head and all bytes up to the close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    async with asyncio.timeout(BOUND_S):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read()
    writer.close()
    return head, body


async def test_chunks_hold_whole_events_and_the_connection_goes_on() -> None:
    async with live() as server:
        expected = (await server.complete(**{name: value for name, value in BODY.items() if name != "stream"}))[
            "choices"
        ]
        data = request("1.1", BODY) + request("1.1", BODY, "Connection: close")
        head, body = await exchange(server, data)
        assert b"transfer-encoding: chunked" in head.lower()
        chunks, behind = unchunked(body)
        assert len(chunks) > 1 and all(chunk.endswith(b"\n\n") for chunk in chunks)
        assert text_of(parse_events(b"".join(chunks))) == expected[0]["text"]
        second_head, _, second = behind.partition(b"\r\n\r\n")
        assert second_head.startswith(b"HTTP/1.1 200"), "the same connection takes the next request"
        more, behind = unchunked(second)
        assert text_of(parse_events(b"".join(more))) == expected[0]["text"] and behind == b""
        # An old client: no chunks, and the end of the connection is the end of the answer.
        head, body = await exchange(server, request("1.0", BODY))
        assert b"chunked" not in head.lower()
        assert text_of(parse_events(body)) == expected[0]["text"]


async def test_a_client_that_does_not_read_holds_nobody_and_gets_everything_later() -> None:
    async with live(num_pages=8192) as server:
        # More than the kernel's buffers take: every token brings its prompt's ids and many log-probabilities.
        wide = BODY | {"max_tokens": 480, "logprobs": 20, "return_token_ids": True, "n": 16}
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(request("1.1", wide, "Connection: close"))
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: server.engine.metrics.generation_tokens >= 16 * 480)
        # The model has gone on without it, and others are served.
        assert (await server.complete(max_tokens=3))["usage"]["completion_tokens"] == 3
        async with asyncio.timeout(BOUND_S):
            chunks, _ = unchunked(await reader.read())
        writer.close()
        ids: dict[int, int] = {}
        for event in parse_events(b"".join(chunks)):
            for choice in event["choices"] if isinstance(event, dict) else []:
                ids[choice["index"]] = ids.get(choice["index"], 0) + len(choice["token_ids"])
        assert ids == dict.fromkeys(range(16), 480)
        await server.all_free()
