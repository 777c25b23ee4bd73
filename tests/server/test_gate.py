"""What every request passes: keys, CORS, request ids, unknown routes, and bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.server.support import BOUND_S, Live, live
from tests.server.test_errors import check_shape

GOOD = {"prompt": "x", "max_tokens": 1}


async def raw_exchange(server: Live, data: bytes) -> bytes:
    """Send bytes and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        async with asyncio.timeout(BOUND_S):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_keys_guard_every_route_but_the_probes() -> None:
    async with live(api_keys=("first-key", "zweiter-schlüssel")) as server:
        for method, path in [
            ("GET", "/"),
            ("GET", "/v1/models"),
            ("GET", "/version"),
            ("GET", "/server_info"),
            ("GET", "/no/such/route"),
            ("POST", "/v1/completions"),
            ("POST", "/tokenize"),
            ("POST", "/flush_cache"),
            ("OPTIONS", "/v1/models"),
            ("DELETE", "/v1/models"),
        ]:
            async with server.http.request(method, server.url + path, data=b"{not json") as response:
                error = check_shape(response.status, await response.json(), expected=401)
                assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/metrics"):
            async with server.http.get(server.url + path) as response:
                assert response.status == 200
        for value in (
            "Bearer first-ke",
            "Bearer first-key2",
            "Bearer",
            "first-key",
            "Basic first-key",
            "Bearer \u00ff",
        ):
            status, _ = await server.post("/v1/completions", GOOD, headers={"Authorization": value})
            assert status == 401, value
        for key in ("first-key", "zweiter-schlüssel"):
            for scheme in ("Bearer", "bearer"):
                headers = {"Authorization": f"{scheme} {key}"}
                assert (await server.post("/v1/completions", GOOD, headers=headers))[0] == 200
        async with server.openai("wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


async def test_a_key_is_asked_for_before_the_body_is_read() -> None:
    async with live(api_keys=("k",)) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head)
        async with asyncio.timeout(BOUND_S):
            assert b" 401 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_response_belongs_to_its_key_however_it_is_sent() -> None:
    async with live(api_keys=("k1", "k2")) as server:
        status, kept = await server.post("/v1/responses", {"input": "x"}, headers={"X-Api-Key": "k1"})
        assert status == 200
        url = f"{server.url}/v1/responses/{kept['id']}"
        for headers, expected in [
            ({"X-Api-Key": "k1"}, 200),
            ({"Authorization": "Bearer k1"}, 200),
            ({"X-Api-Key": "k2"}, 404),
            ({"Authorization": "Bearer k2", "X-Api-Key": "nobody"}, 404),
        ]:
            async with server.http.get(url, headers=headers) as response:
                assert response.status == expected, headers


async def test_metrics_can_be_protected() -> None:
    async with live(api_keys=("k",), protect_metrics=True) as server:
        async with server.http.get(server.url + "/metrics") as response:
            assert response.status == 401
        async with server.http.get(server.url + "/health") as response:
            assert response.status == 200


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, x-custom",
}


async def test_cors() -> None:
    async with live(api_keys=("k",), allowed_origins=("https://app.example",)) as server:
        for path in ("/v1/chat/completions", "/v1/models", "/anything"):
            async with server.http.options(server.url + path, headers=PREFLIGHT) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
                assert response.headers["Access-Control-Allow-Headers"] == "authorization, x-custom"
                assert "POST" in response.headers["Access-Control-Allow-Methods"]
                assert response.headers["Vary"] == "Origin"
        other = PREFLIGHT | {"Origin": "https://evil.example"}
        async with server.http.options(server.url + "/v1/models", headers=other) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
        origin = {"Origin": "https://app.example"}
        body = GOOD | {"stream": True}
        headers = origin | {"Authorization": "Bearer k"}
        async with server.http.post(server.url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
        async with server.http.get(server.url + "/v1/models", headers=origin) as response:  # errors are readable too
            assert response.status == 401 and "Access-Control-Allow-Origin" in response.headers
    async with live(allowed_origins=("*",)) as server, server.http.get(server.url + "/", headers=origin) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_without_origins_there_are_no_cors_headers(server: Live) -> None:
    async with server.http.options(server.url + "/v1/models", headers=PREFLIGHT) as response:
        assert response.status == 204
        assert not [name for name in response.headers if name.startswith("Access-Control")]


async def test_request_ids_are_ours_and_the_clients_is_echoed(server: Live) -> None:
    async def ids(headers: dict[str, str], **extra: Any) -> tuple[str, str]:
        async with server.http.post(server.url + "/v1/completions", json=GOOD | extra, headers=headers) as response:
            return response.headers["X-Request-Id"], (await response.json())["id"]

    first, second = await ids({}), await ids({})
    assert first[1] == f"cmpl-{first[0]}" and first[1] != second[1]
    echoed, own = await ids({"X-Request-Id": "mine-1"})
    assert echoed == "mine-1" and "mine" not in own
    assert (await ids({"X-Request-Id": "mine-1"}))[1] != own  # the same id twice is no clash
    assert (await ids({}, request_id="body-1"))[0] == "body-1"
    assert (await ids({"X-Request-Id": "mine-1"}, request_id="body-1"))[0] == "mine-1"
    for bad in ("x" * 129, "tab\there", "a b", "é"):
        assert (await ids({"X-Request-Id": bad}))[0] != bad
    assert (await ids({}, request_id="a\r\nSet-Cookie: x"))[1]
    async with server.http.get(server.url + "/nowhere", headers={"X-Request-Id": "lost"}) as response:
        assert response.headers["X-Request-Id"] == "lost"


async def test_unknown_routes_and_methods(server: Live) -> None:
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("OPTIONS", "/v1/models", 405),
    ]:
        async with server.http.request(method, server.url + path, json=GOOD) as response:
            check_shape(response.status, await response.json(), expected=status)
            assert ("Allow" in response.headers) == (status == 405)
    async with server.http.head(server.url + "/v1/models") as response:
        assert response.status == 200


async def test_root_path_serves_both_ways() -> None:
    async with live(root_path="/llm/", api_keys=("k",)) as server:
        for path in ("/health", "/llm/health", "/llm/metrics"):
            async with server.http.get(server.url + path) as response:
                assert response.status == 200
        headers = {"Authorization": "Bearer k"}
        assert (await server.post("/llm/v1/completions", GOOD, headers=headers))[0] == 200
        assert (await server.post("/llm/v1/completions", GOOD))[0] == 401


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["garbage", "http2", "header", "line", "field", "length", "smuggling", "tls"],
)
async def test_bytes_that_are_no_http(server: Live, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    answer = await raw_exchange(server, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), head
    check_shape(int(head.split()[1]), json.loads(body))
    assert not caplog.records
    await server.complete("x", max_tokens=1)


async def test_broken_chunks_and_expectations(server: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = await raw_exchange(server, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.") and b" 400 " in answer[:20] and b'"error"' in answer
    answer = await raw_exchange(server, head + b"Connection: close\r\nExpect: miracles\r\nContent-Length: 2\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 417") and b'"error"' in answer
    body = json.dumps(GOOD).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    answer = await raw_exchange(
        server, head + b"Connection: close\r\nExpect: 100-continue\r\n" + length + b"\r\n" + body
    )
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
