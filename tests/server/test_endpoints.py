"""The small routes: models, probes, metrics, tokenize, cache."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.text.chat_template import ChatTemplate
from tests.server.support import Live, live, served_model, tokenizer, until
from tests.server.test_errors import check_shape


async def get(server: Live, path: str) -> tuple[int, Any]:
    async with server.http.get(server.url + path) as response:
        return response.status, await response.json()


async def test_models(server: Live) -> None:
    _, body = await get(server, "/v1/models")
    assert body["object"] == "list" and [card["id"] for card in body["data"]] == ["demo", "org/demo"]
    _, card = await get(server, "/v1/models/org/demo")
    assert card == body["data"][1] and card["max_model_len"] == 512 and card["owned_by"] == "oneloop"
    assert card["root"] == "demo" and card["parent"] is None and card["created"] == 1_700_000_000
    assert (await get(server, "/v1/models/org%2Fdemo"))[1] == card


async def test_health_follows_the_engine(server: Live) -> None:
    async with server.http.get(server.url + "/health") as response:
        assert response.status == 200 and await response.read() == b""
    server.engine.seconds_since_progress = lambda: 61.0  # type: ignore[method-assign]
    check_shape(*await get(server, "/health"), expected=503)
    del server.engine.seconds_since_progress
    server.engine.failed = True
    for path in ("/health", "/ready"):
        check_shape(*await get(server, path), expected=503)
    error = check_shape(*await server.post("/v1/completions", {"prompt": "x"}), expected=503)
    assert error["code"] == "service_unavailable"
    server.engine.failed = False


async def test_a_stuck_device_is_unhealthy() -> None:
    async with live(unresponsive_after_s=0.05) as server:
        server.device.gate.clear()
        waiting = asyncio.create_task(server.complete("x", max_tokens=1))
        await until(lambda: server.engine.seconds_since_progress() > 0.05)
        check_shape(*await get(server, "/health"), expected=503)
        server.device.gate.set()
        await waiting
        async with server.http.get(server.url + "/health") as response:
            assert response.status == 200


async def test_metrics(server: Live) -> None:
    await server.complete("x", max_tokens=3)
    await get(server, "/secret/path")
    async with server.http.get(server.url + "/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await response.text()
    assert "vllm:generation_tokens_total" in text and "vllm:num_requests_running" in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
    assert 'handler="none"' in text and "secret" not in text


async def test_info(server: Live) -> None:
    for path in ("/", "/v1"):
        status, body = await get(server, path)
        assert status == 200 and body["name"] == "oneloop"
    assert set((await get(server, "/version"))[1]) == {"version"}
    for path in ("/server_info", "/get_server_info"):
        _, body = await get(server, path)
        assert body["device"] == "fake" and body["stats"]["num_running"] == 0 and body["max_model_len"] == 512
    assert await get(server, "/load") == (200, {"server_load": 0})


async def test_tokenize_and_back(server: Live) -> None:
    text = "Grüße, 🦜!"
    ids = tokenizer().encode(text)
    for prefix in ("", "/v1"):
        status, body = await server.post(prefix + "/tokenize", {"prompt": text, "model": "demo"})
        assert status == 200
        assert body == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
        _, body = await server.post(prefix + "/detokenize", {"tokens": ids})
        assert body == {"prompt": text, "text": text}
    _, body = await server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert body["token_strs"] == [tokenizer().id_to_token(token) for token in ids]
    status, _ = await server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 200
    bad: list[tuple[str, Any]] = [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "x", "messages": []}),
        ("/tokenize", {"messages": [{"role": "x"}]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
    ]
    for path, body in bad:
        check_shape(*await server.post(path, body))


async def test_flush_cache_when_idle_only(server: Live) -> None:
    async def cached() -> int:
        body = await server.complete([7] * 100, max_tokens=1)
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert (await cached(), await cached()) == (0, 96)
    for method, path in [("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/reset_prefix_cache")]:
        async with server.http.request(method, server.url + path) as response:
            assert response.status == 200 and (await response.json())["success"] is True
        assert (await cached(), await cached()) == (0, 96)
    server.device.gate.clear()
    waiting = asyncio.create_task(server.complete("x", max_tokens=2))
    await until(lambda: server.num_requests() == 1)
    check_shape(*await get(server, "/flush_cache"))
    server.device.gate.set()
    await waiting


async def test_profiling_needs_a_device_that_can(server: Live) -> None:
    for path in ("/start_profile", "/stop_profile"):
        check_shape(*await server.post(path, {}), expected=400)
    started: list[str] = []
    executor = server.engine.executor
    executor.start_profile = started.append  # type: ignore[attr-defined]
    check_shape(*await server.post("/start_profile", {}), expected=400)  # still nowhere to write to
    assert not started


async def test_default_template_kwargs() -> None:
    """The server's defaults, then what an effort means, then the client's own."""
    template = ChatTemplate({"default": "{{ enable_thinking }} {{ colour }} {{ messages[0].content }}"}, {})
    async with live(
        model=served_model(chat_template=template),
        default_chat_template_kwargs={"enable_thinking": False, "colour": "red"},
    ) as server:
        for fields, expected in (
            ({}, "False red hi"),
            ({"reasoning_effort": "high"}, "True red hi"),
            ({"chat_template_kwargs": {"colour": "blue"}}, "False blue hi"),
        ):
            _, ids = await server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}], **fields})
            _, text = await server.post("/detokenize", {"tokens": ids["tokens"]})
            assert text["prompt"] == expected
