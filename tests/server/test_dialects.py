"""What clients of several servers take for granted: names, lengths, short paths, local pages, llama.cpp's routes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.support import Live, live, served_model, text_of

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


# ---- how many tokens


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": HI}, "max_tokens"),
        (CHAT, {"messages": HI}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "hi"}, "max_tokens"),
        ("/v1/responses", {"input": "hi"}, "max_output_tokens"),
        ("/v1/messages", {"messages": HI}, "max_tokens"),
    ],
)
async def test_more_tokens_than_fit_are_as_many_as_fit(path: str, body: dict[str, Any], field: str) -> None:
    async with live(model=served_model(max_model_len=64)) as server:
        status, answer = await server.post(path, {**body, field: 1_000_000})
    assert status == 200, answer
    usage = answer["usage"]
    sizes = [usage.get(name, 0) for name in ("prompt_tokens", "input_tokens", "completion_tokens", "output_tokens")]
    assert sum(sizes) == 64


async def test_more_tokens_than_fit_natively() -> None:
    async with live(model=served_model(max_model_len=64)) as server:
        status, answer = await server.post("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 10**6}})
        assert status == 200
        meta = answer["meta_info"]
        assert meta["prompt_tokens"] + meta["completion_tokens"] == 64
        options = {"num_predict": 10**6}
        body = {"model": "demo", "messages": HI, "stream": False, "options": options}
        status, answer = await server.post("/api/chat", body)
        assert (status, answer["prompt_eval_count"] + answer["eval_count"]) == (200, 64)


async def test_more_tokens_than_fit_can_be_refused() -> None:
    async with live(model=served_model(max_model_len=64), refuse_max_tokens=True) as server:
        status, answer = await server.post(CHAT, {"messages": HI, "max_tokens": 64})
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded" and answer["error"]["param"] == "max_tokens"
        assert (await server.post(CHAT, {"messages": HI, "max_tokens": 9}))[0] == 200


async def test_a_prompt_that_does_not_fit_is_refused_all_the_same() -> None:
    async with live(model=served_model(max_model_len=64)) as server:
        status, answer = await server.post("/v1/completions", {"prompt": [5] * 64, "max_tokens": 5})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_no_tokens_at_all(server: Live) -> None:
    """llama.cpp's way to warm a cache; lm-eval's to score a prompt is in test_logprobs.py."""
    answer = await server.complete("hello there", max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "hello there" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    answer = await server.complete("hello there", max_tokens=0)
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "length"
    for path, body in (("/v1/completions", {"prompt": "hello there", "echo": True}), (CHAT, {"messages": HI})):
        events = await server.events(path, {**body, "max_tokens": 0, "stream_options": {"include_usage": True}})
        assert text_of(events[:-2]) == ("hello there" if "prompt" in body else "")
        assert events[-2]["usage"]["completion_tokens"] == 0
    status, chat = await server.post(CHAT, {"messages": HI, "max_tokens": 0, "return_token_ids": True})
    assert status == 200 and chat["choices"][0]["token_ids"] == []
    assert chat["choices"][0]["message"]["content"] == "" and chat["usage"]["completion_tokens"] == 0


async def test_no_limit(server: Live) -> None:
    answer = await server.complete("x", max_tokens=-1)
    assert answer["usage"]["total_tokens"] == 512
    assert (await server.post("/v1/completions", {"prompt": "x", "max_tokens": -2}))[0] == 400


async def test_llama_cpp_names(server: Live) -> None:
    answer = await server.complete("x", n_predict=3)
    assert answer["usage"]["completion_tokens"] == 3
    assert (await server.complete("x", n_predict=3, max_tokens=2))["usage"]["completion_tokens"] == 2
    greedy = {"max_tokens": 6, "temperature": 0}
    assert await texts(server, repeat_penalty=1.0, **greedy) == await texts(server, **greedy)
    for field, value in (("mirostat", 2), ("dry_multiplier", 0.8), ("xtc_probability", 0.5), ("typical_p", 0.5)):
        status, error = await server.post("/v1/completions", {"prompt": "x", field: value})
        assert status == 400 and error["error"]["param"] == field
    neutral = {"mirostat": 0, "dry_multiplier": 0.0, "xtc_probability": 0.0, "typical_p": 1.0, "dynatemp_range": 0}
    assert (await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **neutral}))[0] == 200
    status, error = await server.post("/v1/completions", {"prompt": "x", "repeat_penalty": -1})
    assert status == 400 and error["error"]["param"] == "repeat_penalty"


async def texts(server: Live, **fields: Any) -> str:
    return (await server.complete("x", **fields))["choices"][0]["text"]


async def test_more_than_five_logprobs(server: Live) -> None:
    answer = await server.complete("x", max_tokens=1, logprobs=20)
    assert len(answer["choices"][0]["logprobs"]["top_logprobs"][0]) in (20, 21)
    assert (await server.post("/v1/completions", {"prompt": "x", "logprobs": 21}))[0] == 400


async def test_running_usage_only_where_usage_is_wanted(server: Live) -> None:
    for wanted in (True, False):
        options = {"continuous_usage_stats": True, "include_usage": wanted}
        body = {"messages": HI, "max_tokens": 3, "stream_options": options}
        events = await server.events(CHAT, body)
        assert any(event.get("usage") for event in events[:-1]) is wanted


# ---- names


async def test_any_name() -> None:
    async with live(model=served_model(any_name=True)) as server:
        for path, body in (
            (CHAT, {"messages": HI, "max_tokens": 1}),
            ("/v1/messages", {"messages": HI, "max_tokens": 1}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
        ):
            status, answer = await server.post(path, {**body, "model": "gpt-99"})
            assert (status, answer["model"]) == (200, "gpt-99")
        body = {"model": "llama9", "messages": HI, "stream": False, "options": {"num_predict": 1}}
        assert (await server.post("/api/chat", body))[0] == 200
        async with server.http.get(server.url + "/v1/models/any/thing") as response:
            assert (await response.json())["id"] == "any/thing"
        async with server.http.get(server.url + "/v1/models") as response:
            assert [card["id"] for card in (await response.json())["data"]] == ["demo", "org/demo"]


async def test_a_name_for_a_router_alone(server: Live) -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 1}, "model": "whatever"}
    assert (await server.post("/generate", body))[0] == 200


async def test_cards_tell_the_context(server: Live) -> None:
    async with server.http.get(server.url + "/v1/models") as response:
        [card, _] = (await response.json())["data"]
    lengths = ("max_model_len", "context_length", "max_context_length", "max_input_tokens", "max_tokens")
    assert {card[name] for name in lengths} == {512}
    assert card["meta"]["n_ctx"] == 512 and card["meta"]["n_vocab"] > 1000
    for path in ("/v1/models", "/models"):
        async with server.http.get(server.url + path, headers={"anthropic-version": "2023-06-01"}) as response:
            answer = await response.json()
        assert (answer["first_id"], answer["last_id"], answer["has_more"]) == ("demo", "org/demo", False)
        assert answer["data"][0]["type"] == "model" and answer["data"][0]["max_input_tokens"] == 512


# ---- paths


async def test_paths_without_v1(server: Live) -> None:
    for path, body in (
        ("/chat/completions", {"messages": HI, "max_tokens": 1}),
        ("/completions", {"prompt": "x", "max_tokens": 1}),
        ("/responses", {"input": "x", "max_output_tokens": 1}),
        ("/embeddings", {"input": "x"}),
        ("/messages", {"messages": HI, "max_tokens": 1}),
        ("/messages/count_tokens", {"messages": HI}),
    ):
        status, answer = await server.post(path, {"model": "demo", **body})
        assert status == 200, (path, answer)
    status, answer = await server.post("/messages", {"model": "demo", "messages": HI})
    assert status == 400 and answer["type"] == "error", "in Anthropic's shape there, too"


async def test_what_nobody_here_can_meet_is_refused_everywhere(server: Live) -> None:
    for path, body in (
        (CHAT, {"messages": HI}),
        ("/v1/completions", {"prompt": "x"}),
        ("/generate", {"text": "x"}),
        ("/v1/messages", {"messages": HI}),
        ("/v1/responses", {"input": "x"}),
        ("/api/chat", {"messages": HI, "stream": False}),
        ("/v1/embeddings", {"input": "x"}),
    ):
        for field in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
            status, answer = await server.post(path, {**body, field: 3})
            assert status == 400 and field in str(answer["error"])


# ---- pages of this machine


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("https://[::1]:1", True),
        ("http://localhost", True),
        ("app://obsidian.md", True),
        ("vscode-webview://1a2b", True),
        ("tauri://localhost", True),
        ("https://app://x", False),
        ("app://x/y", False),
        ("https://app.example", False),
        ("http://localhost.example", False),
        ("http://localhost:3000.example", False),
        ("http://127.0.0.1.example", False),
        ("null", False),
        ("http://user@localhost", False),
    ],
)
async def test_origins_by_default(server: Live, origin: str, allowed: bool) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    async with server.http.options(server.url + CHAT, headers=headers) as response:
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert ("Access-Control-Allow-Headers" in response.headers) is allowed
    async with server.http.get(server.url + "/v1/models", headers={"Origin": origin}) as response:
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize("path", ["/sleep", "/pause", "/flush_cache", "/abort_request", "/api/chat", CHAT])
async def test_pages_of_other_origins_change_nothing(server: Live, path: str) -> None:
    """A page may send anybody a text or nothing at all, without asking first."""
    for headers in (
        {"Origin": "https://app.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://app.example", "Content-Type": "text/plain"},
    ):
        async with server.http.post(server.url + path, headers=headers, data=b"") as response:
            assert response.status == 403, await response.text()
            assert "Access-Control-Allow-Origin" not in response.headers
    assert not server.engine.is_paused and not server.engine.sleep_level
    body = {"messages": HI, "max_tokens": 1}
    for headers in (
        {"Origin": server.url},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "same-origin"},
        # An extension of a browser, or a program with a window of its own, which no CORS holds.
        {"Origin": "chrome-extension://abc"},
    ):
        assert (await server.post(CHAT, body, headers=headers))[0] == 200


async def test_no_origins() -> None:
    origin = {"Origin": "http://localhost:1"}
    async with (
        live(allowed_origins=()) as server,
        server.http.get(server.url + "/v1/models", headers=origin) as response,
    ):
        assert "Access-Control-Allow-Origin" not in response.headers


# ---- llama.cpp


async def test_gbnf_is_kept(server: Live) -> None:
    for fields in ({"grammar": 'root ::= "yes" | "no"'}, {"json_schema": {"enum": ["yes", "no"]}}):
        status, answer = await server.post(CHAT, {"messages": HI, "max_tokens": 9, **fields})
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"].strip('"') in ("yes", "no")
        assert (await server.complete(**fields, max_tokens=9))["choices"][0]["text"].strip('"') in ("yes", "no")
    status, answer = await server.post(CHAT, {"messages": HI, "grammar": "root ::= ("})
    assert status == 400 and answer["error"]["param"] == "grammar"
