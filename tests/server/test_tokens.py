"""vLLM's /inference/v1/generate: the same tokens and figures as a completion's, by ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from tests.server.support import Live, live, parse_events, served_model, until
from tests.server.test_errors import check_shape

PATH = "/inference/v1/generate"
IDS = [5, 6, 7]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Live]:
    async with live() as one:
        yield one


async def ask(server: Live, params: dict[str, Any], **fields: Any) -> Any:
    status, answer = await server.post(PATH, {"token_ids": IDS, "sampling_params": params, **fields})
    assert status == 200, answer
    return answer


async def test_it_says_what_a_completion_does(server: Live) -> None:
    params = {"max_tokens": 6, "n": 2, "logprobs": 2, "prompt_logprobs": 1, "seed": 3, "ignore_eos": True}
    found = await ask(server, params, request_id="rollout-1")
    theirs = await server.complete(IDS, **params, return_token_ids=True, return_tokens_as_token_ids=True)
    assert found["request_id"] == "rollout-1"
    assert found["prompt_logprobs"] == theirs["choices"][0]["prompt_logprobs"]
    assert {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens")} == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
    }
    for choice, other in zip(found["choices"], theirs["choices"], strict=True):
        assert choice["token_ids"] == other["token_ids"] and len(choice["token_ids"]) == 6
        assert choice["finish_reason"] == "length" and choice["index"] == other["index"]
        content, told = choice["logprobs"]["content"], other["logprobs"]
        assert [entry["token"] for entry in content] == told["tokens"]
        assert [entry["token_id"] for entry in content] == choice["token_ids"]
        assert [entry["logprob"] for entry in content] == told["token_logprobs"]
        for entry, top in zip(content, told["top_logprobs"], strict=True):
            assert [one["rank"] for one in entry["top_logprobs"]] == [1, 2] and entry["rank"] >= 1
            assert {one["token"]: one["logprob"] for one in entry["top_logprobs"]}.items() <= top.items()


async def test_a_stream_has_what_is_new(server: Live) -> None:
    params = {"max_tokens": 6, "n": 2, "logprobs": 0, "seed": 3, "ignore_eos": True, "output_kind": 1}
    whole = await ask(server, params)
    assert all(choice["logprobs"]["content"][0]["top_logprobs"] == [] for choice in whole["choices"])
    body = {"token_ids": IDS, "sampling_params": params, "stream": True, "stream_options": {"include_usage": True}}
    async with server.http.post(server.url + PATH, json=body) as response:
        assert response.status == 200
        *events, last, done = parse_events(await response.read())
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert len(events) > 2 and all(event["request_id"] == last["request_id"] for event in events)
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert [token for one in own for token in one["token_ids"]] == choice["token_ids"]
        assert [entry for one in own for entry in one["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["length"]


async def test_what_was_aborted_answers_with_its_tokens_so_far(server: Live) -> None:
    params = {"max_tokens": 200, "seed": 4, "ignore_eos": True}
    running = asyncio.create_task(ask(server, params, request_id="cut"))
    await until(lambda: any(one.sequence.num_tokens > 6 for one in server.engine.publisher.listeners.values()))
    server.device.gate.clear()
    assert (await server.post("/abort_request", {"rid": "cut"}))[1]["num_aborted"] == 1
    server.device.gate.set()
    choice = (await running)["choices"][0]
    assert choice["finish_reason"] == "abort" and 0 < len(choice["token_ids"]) < 200


async def test_how_many_alternatives_may_be_asked_for() -> None:
    """--max-logprobs, in every family's words."""
    bodies = (
        ("/v1/completions", "logprobs", {"prompt": IDS, "max_tokens": 1}),
        ("/v1/completions", "prompt_logprobs", {"prompt": IDS, "max_tokens": 1}),
        ("/v1/chat/completions", "top_logprobs", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
        ("/generate", "top_logprobs_num", {"input_ids": IDS, "return_logprob": True}),
        ("/completion", "n_probs", {"prompt": IDS, "n_predict": 1}),
        ("/api/generate", "top_logprobs", {"prompt": "x", "raw": True, "logprobs": True, "stream": False}),
    )
    async with live(model=served_model(max_logprobs=33)) as server:
        for path, field, body in bodies:
            status, answer = await server.post(path, body | {field: 33})
            assert status == 200, (path, answer)
            status, answer = await server.post(path, body | {field: 34})
            assert status == 400 and field in str(answer), (path, answer)
        params = {"max_tokens": 1, "logprobs": 33}
        (entry,) = (await ask(server, params))["choices"][0]["logprobs"]["content"]
        assert len(entry["top_logprobs"]) == 33
        reply = await server.post(PATH, {"token_ids": IDS, "sampling_params": params | {"logprobs": 34}})
        assert check_shape(*reply, expected=400)["param"] == "sampling_params.logprobs"
