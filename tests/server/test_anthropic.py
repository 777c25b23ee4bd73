"""/v1/messages as Anthropic's clients read it: blocks whole and streamed, tools, thinking, errors in their shape."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from engine.forward import ForwardError
from engine.request import FinishReason
from engine.stream import Delta, TokenStream
from server.answers.anthropic import SIGNATURE, AnthropicAnswer
from server.protocol.anthropic import parse_messages
from server.protocol.body import Body
from tests.server.support import BOUND_S, DEMO, Live, cuts, live, served_model, teach, until
from tests.server.test_gate import raw_exchange
from tests.server.test_logprobs import device

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
CHAT = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 120, "messages": HI, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
TIME = {"name": "get_time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def check_error(status: int, body: Any, expected: int = 400) -> str:
    assert status == expected, body
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error" and body["request_id"]
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == KINDS[expected]
    assert "Traceback" not in body["error"]["message"]
    return str(body["error"]["message"])


def parse_named(raw: bytes) -> list[dict[str, Any]]:
    """Named events, whose names are their types."""
    assert raw.endswith(b"\n\n")
    events = []
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


THINKS: dict[str, Any] = {"thinking": {"type": "adaptive"}}


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream adds up to, by the rules of Anthropic's own clients."""
    assert events[0]["type"] == "message_start" and events[-1] == {"type": "message_stop"}
    message: dict[str, Any] = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    pieces: list[str] = []
    opened = 0
    for event in events[1:-1]:
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "content_block_start":
            assert opened == len(message["content"]) == event["index"]
            message["content"].append(dict(event["content_block"]))
            pieces, opened = [], opened + 1
        elif kind == "content_block_delta":
            assert event["index"] == opened - 1 == len(message["content"]) - 1
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                assert block["type"] == "tool_use" and block["input"] == {}
                pieces.append(delta["partial_json"])
            elif delta["type"] == "signature_delta":
                assert block["type"] == "thinking" and block["signature"] == "" != delta["signature"]
                block["signature"] = delta["signature"]
            else:
                assert delta["type"] == f"{block['type']}_delta" and delta[block["type"]]
                block[block["type"]] += delta[block["type"]]
        elif kind == "content_block_stop":
            assert event["index"] == opened - 1
            if pieces:
                text = "".join(pieces)
                try:
                    message["content"][-1]["input"] = json.loads(text)
                except json.JSONDecodeError:
                    message["content"][-1]["input"] = {"INVALID_JSON": text}
        else:
            assert kind == "message_delta" and event is events[-2]
            message |= event["delta"]
            message["usage"] |= event["usage"]
    assert sum(event["type"] == "content_block_stop" for event in events) == opened
    return message


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without ids, and with all input as input: the second of two has more in the cache."""
    usage = message["usage"]
    assert set(usage) == {
        "input_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "output_tokens",
    }
    assert message["type"] == "message" and message["role"] == "assistant" and message["id"].startswith("msg_")
    return {
        "content": [{key: value for key, value in block.items() if key != "id"} for block in message["content"]],
        "stop": (message["stop_reason"], message["stop_sequence"]),
        "input": usage["input_tokens"] + usage["cache_read_input_tokens"],
        "output": usage["output_tokens"],
    }


async def stream(server: Live, body: dict[str, Any]) -> dict[str, Any]:
    async with server.http.post(server.url + MESSAGES, json={**body, "stream": True}) as response:
        raw = await response.read()
        assert response.status == 200, raw
        assert response.headers["Content-Type"].startswith("text/event-stream")
    return joined(parse_named(raw))


async def both_ways(server: Live, body: dict[str, Any]) -> dict[str, Any]:
    status, whole = await server.post(MESSAGES, body)
    assert status == 200, whole
    found = plain(whole)
    assert plain(await stream(server, body)) == found
    return found


async def say(server: Live, text: str, body: dict[str, Any]) -> dict[str, Any]:
    status, count = await server.post(COUNT, body)
    assert status == 200, count
    teach(server, text, count["input_tokens"])
    found = await both_ways(server, body)
    assert found["input"] == count["input_tokens"]
    return found


def texts(found: dict[str, Any]) -> str:
    assert all(set(block) == {"type", "text"} for block in found["content"])
    return "".join(block["text"] for block in found["content"])


async def test_a_result_alone_that_says_nothing(server: Live) -> None:
    result = {"type": "tool_result", "tool_use_id": "", "content": None, "is_error": False}
    status, _ = await server.post(MESSAGES, {**BODY, "messages": [{"role": "user", "content": [result]}]})
    assert status == 200


async def test_text_and_why_it_ended(server: Live) -> None:
    found = await say(server, "Grüße, 🦊 fox!", BODY)
    assert found["content"] == [{"type": "text", "text": "Grüße, 🦊 fox!"}] and found["stop"] == ("end_turn", None)
    found = await say(server, "One two three", {**BODY, "stop_sequences": ["nine", " th"]})
    assert texts(found) == "One two" and found["stop"] == ("stop_sequence", " th")
    found = await say(server, "One two three", {**BODY, "max_tokens": 2})
    assert found["stop"] == ("max_tokens", None) and found["output"] == 2
    # More than there is room for: it ends with the context and says so.
    server.device.script = None
    found = await both_ways(server, {**BODY, "max_tokens": 100_000})
    assert found["stop"] == ("model_context_window_exceeded", None) and found["input"] + found["output"] == 512
    await server.all_free()


async def test_the_cache_is_no_input(server: Live) -> None:
    body = {**BODY, "system": "You are kind. " * 20, "max_tokens": 2}
    _, first = await server.post(MESSAGES, body)
    _, second = await server.post(MESSAGES, {**body, "messages": [{"role": "user", "content": "ho"}]})
    assert first["usage"]["cache_read_input_tokens"] == 0
    assert second["usage"]["cache_read_input_tokens"] >= 16 and second["usage"]["cache_creation_input_tokens"] == 0
    _, count = await server.post(COUNT, body)
    assert first["usage"]["input_tokens"] == count["input_tokens"]
    _, other = await server.post(MESSAGES, {**body, "cache_salt": "mine"})
    assert other["usage"]["cache_read_input_tokens"] == 0


async def prompt_of(server: Live, path: str, body: dict[str, Any]) -> int:
    status, answer = await server.post(path, body)
    assert status == 200, answer
    return int(answer["input_tokens"] if path == COUNT else len(answer["token_ids"]))


async def test_a_conversation_is_the_prompt_that_a_chat_makes(server: Live) -> None:
    """Turn by turn: the same tokens as the same conversation over /v1/chat/completions."""
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?", **cached}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, call]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "user", "content": "Well?"},
    ]
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"type": "function", "id": "toolu_1", "function": {"name": "get_weather", "arguments": call["input"]}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "get_weather", "content": "sunny"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "text", "text": "Well?"}]},
    ]
    function = {"name": "get_weather", "parameters": SCHEMA, "description": "The weather."}
    rendered = await server.post(
        f"{CHAT}/render", {"messages": chat, "tools": [{"type": "function", "function": function}]}
    )
    ours = {"model": "demo", "messages": messages, "tools": [WEATHER], "max_tokens": 1}
    for system in ("Be kind.", [{"type": "text", "text": "Be kind.", **cached}]):
        plan, _ = await parse_messages(Body({**ours, "system": system}), server.state, "msg_x")
        assert plan.requests[0].prompt_token_ids == rendered[1]["token_ids"]
        assert await prompt_of(server, COUNT, {**ours, "system": system}) == len(rendered[1]["token_ids"])
    # An error of a tool is told to the model.
    failed = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no such city", "is_error": True}
    plan, _ = await parse_messages(
        Body({**ours, "messages": [*messages[:3], {"role": "user", "content": [failed]}]}), server.state, "msg_x"
    )
    assert "Error: no such city" in server.state.tokenizer.decode(plan.requests[0].prompt_token_ids)


async def test_the_beginning_of_an_answer_is_gone_on_with(server: Live) -> None:
    messages = [*HI, {"role": "assistant", "content": "Once upon"}]
    plan, _ = await parse_messages(Body({**BODY, "messages": messages}), server.state, "msg_x")
    assert server.state.tokenizer.decode(plan.requests[0].prompt_token_ids).endswith("assistant\nOnce upon")
    assert texts(await say(server, " a time.", {**BODY, "messages": messages})) == " a time."


async def test_tools(server: Live) -> None:
    body = {**BODY, "tools": [WEATHER, TIME]}
    use = {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    found = await say(server, f"Let me look.\n{CALL}", body)
    assert found["content"] == [{"type": "text", "text": "Let me look."}, use]
    assert found["stop"] == ("tool_use", None)
    found = await say(server, f"{CALL}\n{CALL}", body)
    assert found["content"] == [use, use]
    single = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert (await say(server, f"{CALL}\n{CALL}", {**body, **single}))["content"] == [use]
    # Cut off amid a call: its text is not lost, and nobody takes it for arguments.
    said = server.state.tokenizer.encode(CALL.partition("Paris")[0])
    found = await say(server, CALL, {**body, "max_tokens": len(said)})
    assert found["stop"] == ("max_tokens", None)
    assert found["content"] == [use | {"input": {"INVALID_JSON": '{"city": "'}}]
    # Forced ones keep their schema at any temperature.
    server.device.script = None
    for choice, names in (
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather", "get_time"}),
        ({"type": "tool", "name": "get_weather"}, {"get_weather"}),
    ):
        found = await both_ways(server, {**body, "tool_choice": choice, "temperature": 1, "seed": 3, "max_tokens": 300})
        [block] = found["content"]
        assert block["name"] in names and found["stop"] == ("tool_use", None)
        assert block["name"] == "get_time" or block["input"]["city"] in ("Paris", "Oslo")
    # None: nobody looks for calls, and no tools is what an empty list says.
    for fields in ({"tool_choice": {"type": "none"}}, {"tools": []}):
        teach(server, CALL, await prompt_of(server, COUNT, {**body, **fields}))
        assert texts(await both_ways(server, {**body, **fields})) == CALL


async def test_thinking() -> None:
    async with live(reasoning_parser="qwen3") as server:
        said = "<think>\nHm, hm.\n</think>\n\nYes!"
        thought = {"type": "thinking", "thinking": "Hm, hm.", "signature": SIGNATURE}
        # What nobody asked for is not shown.
        assert texts(await say(server, said, BODY)) == "Yes!"
        asked = {**BODY, "thinking": {"type": "adaptive"}}
        found = await say(server, said, asked)
        assert found["content"] == [thought, {"type": "text", "text": "Yes!"}]
        found = await say(server, said, {**BODY, "thinking": {"type": "adaptive", "display": "omitted"}})
        assert found["content"][0] == {**thought, "thinking": ""} and found["content"][1]["text"] == "Yes!"
        found = await say(server, said, {**BODY, "thinking": {"type": "enabled", "budget_tokens": 3}})
        [cut, *rest] = found["content"]
        num_tokens = len(server.state.tokenizer.encode(cut["thinking"], add_special_tokens=False))
        assert cut["type"] == "thinking" and num_tokens <= 3 and rest, found
        found = await say(server, f"<think>I need it.</think>{CALL}", {**asked, "tools": [WEATHER]})
        assert [block["type"] for block in found["content"]] == ["thinking", "tool_use"]
    # Templates are told whether to think.
    source = "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }}"
    template = type(served_model().chat_template)({"default": source}, {})  # type: ignore[misc]
    async with live(model=served_model(chat_template=template)) as server:
        for fields, text in (
            ({"thinking": {"type": "disabled"}}, "False False "),
            ({"thinking": {"type": "adaptive"}}, "True True "),
            ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "True True "),
            ({"output_config": {"effort": "low"}}, "False False low"),
            ({}, "False False "),
            ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": 1}}, "False 1 "),
        ):
            plan, _ = await parse_messages(Body({**BODY, **fields}), server.state, "msg_x")
            assert server.state.tokenizer.decode(plan.requests[0].prompt_token_ids) == text


async def test_structured_output(server: Live) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        found = await both_ways(server, {**BODY, **fields, "temperature": 1, "seed": 5})
        assert json.loads(texts(found))["city"] in ("Paris", "Oslo") and found["stop"] == ("end_turn", None)


async def test_how_the_text_falls_into_pieces_changes_nothing() -> None:
    rng = random.Random(7)
    async with live(reasoning_parser="qwen3") as server:
        plan, wanted = await parse_messages(Body({**BODY, **THINKS, "tools": [WEATHER]}), server.state, "msg_x")

        def answer() -> AnthropicAnswer:
            return AnthropicAnswer(server.state, plan, [TokenStream("x", 5, lambda _: None)], wanted=wanted)

        for text in (f"<think>Hm.</think>Look. {CALL}\n{CALL} Done.", "a <tool_ b", CALL[:-30], "x"):
            for _ in range(20):
                pieces = cuts(text, rng)
                whole = answer().whole([Delta(text, [1] * len(pieces), FinishReason.STOP)])
                streamed = answer()
                raw = streamed.opening()
                for count, piece in enumerate(pieces, 1):
                    reason = FinishReason.STOP if count == len(pieces) else None
                    raw += streamed.delta(0, Delta(piece, [1], reason))
                assert plain(joined(parse_named(raw + streamed.closing()))) == plain(whole)


# ---- errors

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": 1}]}]},
        "messages[0].content[0].is_error",
    ),
    ({"messages": [*HI, {"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[1].content[0]"),
    ({"system": 5}, "system"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -7}, "top_k"),
    ({"stream": 1}, "stream"),
    ({"metadata": 5}, "metadata"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"tools": 5}, "tools"),
    ({"tools": ["x"]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "f", "input_schema": {}, "description": 5}]}, "tools[0].description"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {}}, "tool_choice.type"),
    ({"tools": [TIME], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TIME], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    (
        {"tools": [TIME], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
        "tool_choice.disable_parallel_tool_use",
    ),
    ({"thinking": 5}, "thinking"),
    ({"thinking": {}}, "thinking.type"),
    ({"thinking": {"type": "between_words"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 120}}, "thinking.budget_tokens"),
    ({"output_config": {"effort": ""}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "output_config.format.schema"),
]


async def test_bad_bodies_are_400_in_their_shape_and_name_the_field(server: Live) -> None:
    for fields, name in REFUSED:
        for extra in ({}, {"stream": True}):
            async with asyncio.timeout(BOUND_S):
                message = check_error(*await server.post(MESSAGES, {**BODY, **extra, **fields}))
            assert f"`{name}`" in message or f"'{name}'" in message, (fields, message)
        assert (await server.post(MESSAGES, {**BODY, "max_tokens": 1}))[0] == 200
    await server.all_free()


async def test_every_error_has_their_shape() -> None:
    async with live(api_keys=("k",), max_body_bytes=2000) as server:
        for path in (MESSAGES, COUNT):
            check_error(*await server.post(path, BODY), expected=401)
            check_error(*await server.post(path, BODY, headers={"X-Api-Key": "j"}), expected=401)
            for headers in ({"X-Api-Key": "k"}, {"Authorization": "Bearer k", "anthropic-version": "2023-06-01"}):
                assert (await server.post(path, {**BODY, "max_tokens": 1}, headers=headers))[0] == 200
            own = {"X-Api-Key": "k"}
            message = check_error(*await server.post(path, {**BODY, "model": "claude"}, headers=own), expected=404)
            assert "claude" in message
            check_error(*await server.post(path, {**BODY, "system": "x" * 3000}, headers=own), expected=413)
            for method, data, expected in (("GET", b"", 405), ("POST", b"{}", 415), ("PUT", b"{}", 405)):
                async with server.http.request(method, server.url + path, data=data, headers=own) as response:
                    check_error(response.status, await response.json(), expected=expected)
            async with server.http.post(
                server.url + path, data=b"{", headers={**own, "Content-Type": "application/json", "X-Request-Id": "me"}
            ) as response:
                body = await response.json()
                check_error(response.status, body)
                assert body["request_id"] == response.headers["X-Request-Id"] == "me"
        # What is no route of theirs keeps the other shape.
        status, body = await server.post(CHAT, {"messages": HI})
        assert status == 401 and set(body) == {"error"}


async def test_shapes_under_a_root_path_and_before_the_gate() -> None:
    async with live(root_path="/llm") as server:
        check_error(*await server.post("/llm" + MESSAGES, {**BODY, "max_tokens": 0}))
        head = f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: miracles\r\n"
        answer = await raw_exchange(server, head.encode() + b"Content-Length: 2\r\n\r\n{}")
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert answer.startswith(b"HTTP/1.1 417") and body["type"] == "error" and body["request_id"] is None


async def test_overload_and_prompts_that_do_not_fit() -> None:
    async with live(max_queued_requests=1, max_num_seqs=1, drain_timeout_s=30.0) as server:
        message = check_error(*await server.post(MESSAGES, {**BODY, "system": "w " * 600}))
        # Agents look for either.
        assert message.startswith("prompt is too long: ") and "maximum context length is 512 tokens" in message
        server.device.gate.clear()
        first = asyncio.create_task(server.post(MESSAGES, BODY))
        await until(lambda: server.engine.stats().num_running == 1)
        second = asyncio.create_task(server.post(MESSAGES, BODY))
        await until(lambda: server.num_requests() == 2)
        async with server.http.post(server.url + MESSAGES, json=BODY) as response:
            check_error(response.status, await response.json(), expected=429)
            assert response.headers["Retry-After"]
        server.stop.set()
        await until(lambda: server.engine.draining)
        server.device.gate.set()
        assert (await first)[0] == (await second)[0] == 200


async def test_a_draining_server_is_overloaded(server: Live) -> None:
    server.engine.draining = True
    check_error(*await server.post(MESSAGES, BODY), expected=503)


async def test_failures_before_and_after_the_first_token() -> None:
    failing: set[int] = set()

    def fail_on(step: int) -> None:
        if step in failing:
            raise ForwardError("out of luck")

    async with live(fail_on=fail_on) as server:
        for extra in ({}, {"stream": True}):
            failing |= set(range(server.device.num_steps, server.device.num_steps + 30))
            check_error(*await server.post(MESSAGES, {**BODY, **extra}), expected=500)
            await server.all_free()
        failing.clear()
        failing |= set(range(server.device.num_steps + 3, server.device.num_steps + 30))
        async with server.http.post(server.url + MESSAGES, json={**BODY, "stream": True}) as response:
            events = parse_named(await response.read())
        assert events[0]["type"] == "message_start"
        check_error(500, events[-1], expected=500)
        await server.all_free()


async def test_one_that_is_aborted_ends_with_an_error(server: Live) -> None:
    """There is no stop reason for it."""
    server.device.script = None
    async with server.http.post(server.url + MESSAGES, json={**BODY, "max_tokens": 400, "stream": True}) as response:
        await response.content.readuntil(b"content_block_delta")
        [running] = server.state.submitted
        server.engine.abort(running)
        tail = await response.read()
    check_error(503, parse_named(b"event: " + tail.partition(b"\n\nevent: ")[2])[-1], expected=503)
    await server.all_free()


async def test_pings_while_a_prompt_is_computed() -> None:
    async with live(keep_alive_interval_s=0.02) as server:
        server.device.gate.clear()
        async with server.http.post(server.url + MESSAGES, json={**BODY, "stream": True}) as response:
            first = await response.content.readuntil(b"\n\n")
            assert parse_named(first) == [{"type": "ping"}]
            server.device.gate.set()
            raw = await response.read()
        events = [event for event in parse_named(raw) if event["type"] != "ping"]
        assert joined(events)["stop_reason"] == "max_tokens"


# ---- with a model that means something


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


async def test_a_tool_loop_with_the_demo_model(demo: Live) -> None:
    [item] = [item for item in json.loads((DEMO / "prompts.json").read_text()) if item["name"] == "tool"]
    tools = [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in item["tools"]
    ]
    for tool, given in zip(tools, item["tools"], strict=True):
        if "description" in given["function"]:
            tool["description"] = given["function"]["description"]
    body = {**BODY, "messages": item["messages"], "tools": tools}
    _, first = await demo.post(MESSAGES, body)
    [use] = first["content"]
    assert first["stop_reason"] == "tool_use" and use["name"] == "get_weather" and use["input"] == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": '{"weather": "sunny", "temperature": 21}'}
    messages = [
        *item["messages"],
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    found = await both_ways(demo, {**body, "messages": messages})
    assert found["stop"] == ("end_turn", None) and "sunny" in texts(found)
