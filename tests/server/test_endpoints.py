"""The small routes: models, probes, metrics, tokenize, cache."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

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


async def test_pages_of_models_for_anthropics_clients() -> None:
    names = tuple(f"m{number}" for number in range(25))
    # What is asked; the first and the last name of the page, and whether there are more.
    cases: list[tuple[str, tuple[str | None, str | None], bool]] = [
        ("", ("m0", "m19"), True),
        ("?limit=1000", ("m0", "m24"), False),
        ("?limit=2", ("m0", "m1"), True),
        ("?limit=2&after_id=m1", ("m2", "m3"), True),
        ("?limit=2&after_id=m22", ("m23", "m24"), False),
        ("?after_id=m24", (None, None), False),
        ("?limit=2&before_id=m5", ("m3", "m4"), True),
        ("?limit=5&before_id=m5", ("m0", "m4"), False),
        ("?before_id=m0", (None, None), False),
    ]
    bad = (
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "limit=",
        "after_id=x",
        "before_id=",
        "after_id=m1&before_id=m5",
    )
    async with live(model=served_model(names=names)) as server:
        headers = {"anthropic-version": "2023-06-01"}
        for query, ends, has_more in cases:
            async with server.http.get(f"{server.url}/v1/models{query}", headers=headers) as response:
                body = await response.json()
            assert (body["first_id"], body["last_id"]) == ends and body["has_more"] is has_more, query
            shown = [card["id"] for card in body["data"]]
            assert (shown[0] if shown else None, shown[-1] if shown else None) == ends
        for query in bad:
            async with server.http.get(f"{server.url}/v1/models?{query}", headers=headers) as response:
                check_shape(response.status, await response.json())
        # OpenAI's list has no pages.
        assert len((await get(server, "/v1/models?limit=2"))[1]["data"]) == 25


@pytest.mark.parametrize("root_path", ["", "/llm"])
async def test_a_slash_at_the_end_changes_nothing(root_path: str) -> None:
    async with live(root_path=root_path) as server:
        for path in ("/v1/models", "/v1/models/org/demo", "/v1", "/health", "/api/tags", "/metrics", "/models"):
            statuses = []
            for form in (path, path + "/"):
                async with server.http.get(server.url + root_path + form) as response:
                    statuses.append(response.status)
            assert statuses == [200, 200], path
        fields = {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        for path in ("/v1/chat/completions/", "/chat/completions/", "/v1/messages/"):
            assert (await server.post(root_path + path, fields))[0] == 200
        status, body = await server.post(root_path + "/v1/messages/", {})
        assert status == 400 and body["type"] == "error"
        # One name for both in the metrics.
        async with server.http.get(server.url + "/metrics") as response:
            text = await response.text()
        assert f'"{root_path}/v1/messages"' in text and f'"{root_path}/v1/messages/"' not in text


async def test_a_method_that_a_route_does_not_take_says_which_it_takes(server: Live) -> None:
    # The text of the error, wherever the family has it.
    cases: list[tuple[str, str, str, Any]] = [
        ("GET", "/v1/chat/completions", "POST", lambda body: body["error"]["message"]),
        ("PUT", "/v1/models", "GET, HEAD", lambda body: body["error"]["message"]),
        ("PUT", "/v1/responses/x", "DELETE, GET, HEAD", lambda body: body["error"]["message"]),
        ("GET", "/v1/messages", "POST", lambda body: body["type"] == "error" and body["error"]["message"]),
        ("GET", "/v1/messages/count_tokens/", "POST", lambda body: body["request_id"] and body["error"]["message"]),
        ("PATCH", "/api/chat", "POST", lambda body: body["error"]),
        ("GET", "/api/blobs/sha256:0", "POST", lambda body: body["error"]),
    ]
    for method, path, allowed, message in cases:
        async with server.http.request(method, server.url + path) as response:
            body = await response.json()
        assert response.status == 405 and response.headers["Allow"] == allowed, (path, response.headers)
        assert message(body) == f"This route takes {allowed}, and not this method.", body


async def test_health_follows_the_engine(server: Live) -> None:
    async with server.http.get(server.url + "/health") as response:
        assert response.status == 200 and await response.read() == b""
    server.engine.seconds_since_progress = lambda: 61.0  # type: ignore[method-assign]
    check_shape(*await get(server, "/health"), expected=503)
    del server.engine.seconds_since_progress
    server.engine.failed = True
    for path in ("/health", "/v1/health", "/ready"):
        check_shape(*await get(server, path), expected=503)
    error = check_shape(*await server.post("/v1/completions", {"prompt": "x"}), expected=503)
    assert error["code"] == "service_unavailable"
    server.engine.failed = False


async def test_a_stuck_device_is_unhealthy() -> None:
    async with live(stall_timeout_s=0.05) as server:
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
        assert body == {"prompt": text, "text": text, "content": text}
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
