"""llama.cpp's own routes: /completion, /tokenize with `content`, /props, /slots, /lora-adapters; LM Studio's lists."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine.forward import ForwardError
from tests.server.dictate import dictated
from tests.server.support import Live, live, tokenizer, until

PATH = "/completion"
COUNTS = {"index", "id_slot", "tokens_predicted", "tokens_evaluated", "content", "tokens", "stop"}
ENDING = {
    "model", "stop_type", "stopping_word", "generation_settings", "prompt", "has_new_line", "truncated",
    "tokens_cached", "timings",
}  # fmt: skip


async def events(server: Live, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with server.http.post(server.url + PATH, json={"stream": True, **body}) as response:
        raw = await response.read()
        assert response.status == 200 and response.content_type == "text/event-stream"
    lines = raw.decode().split("\n\n")
    assert lines[-1] == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_an_answer(server: Live) -> None:
    with dictated(server, "one\ntwo"):
        status, body = await server.post(PATH, {"prompt": "count", "temperature": 0})
    assert status == 200 and set(body) == COUNTS | ENDING
    said, prompt = (tokenizer().encode(text, add_special_tokens=False) for text in ("one\ntwo", "count"))
    assert body["content"] == "one\ntwo" and body["stop"] is True and body["tokens"] == []
    assert (body["stop_type"], body["stopping_word"], body["has_new_line"]) == ("eos", "", True)
    assert (body["tokens_predicted"], body["tokens_evaluated"]) == (len(said) + 1, len(prompt))
    assert body["prompt"] == "count" and body["generation_settings"]["temperature"] == 0
    timings = body["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == len(prompt) and timings["predicted_n"] == len(said) + 1
    assert timings["predicted_ms"] >= 0 and timings["prompt_ms"] > 0


async def test_why_it_ends(server: Live) -> None:
    with dictated(server, "one two three"):
        _, body = await server.post(PATH, {"prompt": "x", "stop": ["two"]})
        assert (body["stop_type"], body["stopping_word"], body["content"]) == ("word", "two", "one ")
        _, body = await server.post(PATH, {"prompt": "x", "n_predict": 1})
        assert (body["stop_type"], body["tokens_predicted"]) == ("limit", 1)
    _, body = await server.post(PATH, {"prompt": "x", "n_predict": 0})
    assert (body["content"], body["tokens_predicted"], body["stop_type"]) == ("", 0, "limit")
    assert body["generation_settings"]["n_predict"] == 0


async def test_a_stream_is_the_same_answer(server: Live) -> None:
    body = {"prompt": "x", "n_predict": 6, "seed": 7, "return_tokens": True, "n_probs": 2, "timings_per_token": True}
    _, whole = await server.post(PATH, body)
    *pieces, last = await events(server, body)
    assert all(not piece["stop"] and set(piece["timings"]) == set(whole["timings"]) for piece in pieces)
    assert "".join(piece["content"] for piece in pieces) == whole["content"] and last["content"] == ""
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"] and len(whole["tokens"]) == 6
    shown = [one for piece in pieces for one in piece["completion_probabilities"]]
    assert shown == whole["completion_probabilities"] and [one["id"] for one in shown] == whole["tokens"]
    assert all(len(one["top_logprobs"]) == 2 for one in shown)
    assert last["stop"] and last["stop_type"] == "limit" and last["tokens_predicted"] == 6
    assert last["generation_settings"] == whole["generation_settings"]


async def test_many_prompts_are_a_list(server: Live) -> None:
    _, body = await server.post(PATH, {"prompt": ["a", "b"], "n_predict": 2})
    assert [answer["index"] for answer in body] == [0, 1] and [answer["prompt"] for answer in body] == ["a", "b"]
    _, body = await server.post(PATH, {"prompt": [[5, 6, 7]], "n_predict": 2})
    assert len(body) == 1 and body[0]["tokens_evaluated"] == 3
    found = await events(server, {"prompt": ["a", "b"], "n_predict": 2})
    assert sorted(event["index"] for event in found if event["stop"]) == [0, 1]


async def test_what_is_asked_for_holds(server: Live) -> None:
    _, body = await server.post(PATH, {"prompt": "x", "grammar": 'root ::= "yes" | "no"', "n_predict": 20})
    assert body["content"] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    _, body = await server.post(PATH, {"prompt": "x", "json_schema": schema, "n_predict": 40})
    assert json.loads(body["content"]) == {"a": "x"}
    # A token by its id, a text by its tokens; false is the lowest bias.
    [token], [one, other] = (tokenizer().encode(text, add_special_tokens=False) for text in ("a", "a b"))
    with dictated(server, "ok") as requests:
        for pairs, wanted in (
            ([[token, 1.5]], {token: 1.5}),
            ([["a", 2]], {token: 2}),
            ([["a b", False]], {one: -100, other: -100}),
            ([["a", 3], [token, False]], {token: -100}),
            ({str(token): -1}, {token: -1}),
        ):
            status, body = await server.post(PATH, {"prompt": "x", "logit_bias": pairs})
            assert status == 200 and dict(requests[-1].sampling.logit_bias) == wanted


async def test_hints_are_taken_and_told(server: Live) -> None:
    hints = {"id_slot": 0, "cache_prompt": False, "samplers": ["top_k"], "n_keep": 5}
    async with server.http.post(server.url + PATH, json={"prompt": "x", "n_predict": 1, **hints}) as response:
        assert response.status == 200
        assert response.headers["X-Oneloop-Ignored"] == "id_slot, cache_prompt, n_keep, samplers"
    neutral = {
        "id_slot": -1,
        "cache_prompt": True,
        "samplers": [],
        "n_keep": 0,
        "stop": "",
        "grammar": "",
        "mirostat": 0,
    }
    async with server.http.post(server.url + PATH, json={"prompt": "x", "n_predict": 1, **neutral}) as response:
        assert response.status == 200 and "X-Oneloop-Ignored" not in response.headers


async def test_a_failure_in_a_stream_ends_it() -> None:
    def fail(step: int) -> None:
        if step > 2:
            raise ForwardError("broken")

    async with live(fail_on=fail) as server:
        found = await events(server, {"prompt": "x", "n_predict": 50})
    assert "error" in found[-1]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_tokenize_content(server: Live, path: str) -> None:
    ids = tokenizer().encode("hé!", add_special_tokens=False)
    assert await server.post(path, {"content": "hé!"}) == (200, {"tokens": ids})
    _, body = await server.post(path, {"content": "hé!", "with_pieces": True})
    assert [one["id"] for one in body["tokens"]] == ids
    pieces = [one["piece"] for one in body["tokens"]]
    assert b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces) == "hé!".encode()
    assert (await server.post(path, {"content": "x", "prompt": "x"}))[0] == 400
    assert (await server.post(path, {"content": "x", "parse_special": False}))[0] == 400
    status, body = await server.post("/detokenize", {"tokens": ids})
    assert status == 200 and body["content"] == "hé!"


async def test_lists(server: Live) -> None:
    async def get(path: str) -> Any:
        async with server.http.get(server.url + path) as response:
            return response.status, await response.json()

    assert await get("/lora-adapters") == (200, [])
    status, old = await get("/api/v0/models")
    assert status == 200 and [card["id"] for card in old["data"]] == ["demo", "org/demo"]
    assert old["data"][0]["max_context_length"] == 512 and old["data"][0]["capabilities"] == ["tool_use"]
    assert await get("/api/v0/models/org/demo") == (200, old["data"][1])
    assert (await get("/api/v0/models/other"))[0] == 404
    status, new = await get("/api/v1/models")
    assert status == 200 and [card["key"] for card in new["models"]] == ["demo", "org/demo"]
    assert new["models"][0]["loaded_instances"] == [{"id": "demo", "config": {"context_length": 512}}]


async def test_a_client_that_leaves_frees_its_pages(server: Live) -> None:
    server.device.gate.clear()
    waiting = asyncio.create_task(server.post(PATH, {"prompt": "x", "n_predict": 100}))
    await until(lambda: server.num_requests() == 1)
    waiting.cancel()
    server.device.gate.set()
    await server.all_free()


async def test_props(server: Live) -> None:
    async with server.http.get(server.url + "/props") as response:
        props = await response.json()
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert props["total_slots"] == 64 and "<|im_start|>" in props["chat_template"]
    assert props["model_path"] == "demo" and not props["is_sleeping"]


async def test_slots(server: Live) -> None:
    async def slots(query: str = "") -> tuple[int, Any]:
        async with server.http.get(server.url + "/slots" + query) as response:
            return response.status, await response.json()

    status, idle = await slots("?fail_on_no_slot=1")
    assert status == 200 and len(idle) == 64 and not any(slot["is_processing"] for slot in idle)
    server.device.gate.clear()
    asking = asyncio.create_task(
        server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30})
    )
    await until(lambda: server.engine.stats().num_running == 1)
    _, busy = await slots()
    server.device.gate.set()
    assert (await asking)[0] == 200
    [slot] = [slot for slot in busy if slot["is_processing"]]
    assert slot["n_prompt_tokens"] > 1 and slot["next_token"]["n_remain"] <= 30


async def test_no_free_slot() -> None:
    async with live(max_num_seqs=1) as server:
        server.device.gate.clear()
        asking = asyncio.create_task(server.complete(max_tokens=3))
        await until(lambda: server.engine.stats().num_running == 1)
        async with server.http.get(server.url + "/slots?fail_on_no_slot=1") as refused:
            assert refused.status == 503
        server.device.gate.set()
        await asking
