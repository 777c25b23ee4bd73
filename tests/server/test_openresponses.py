"""/v1/responses by the Open Responses specification: the cases of its compliance suite but the image, each answer and
each event held against the required fields and kinds that the specification gives them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.server.dictate import dictated
from tests.server.histories import RESPONSES, call
from tests.server.support import Live, live

Json = dict[str, Any]


def obj(optional: Json | None = None, **required: Json) -> Json:
    """An object that has at least these fields, of these kinds."""
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


def one(*values: str) -> Json:
    return {"enum": list(values)}


def many(items: Json) -> Json:
    return {"type": "array", "items": items}


TEXT: Json = {"type": "string"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
COUNT: Json = {"type": "integer", "minimum": 0}
COUNT_OR_NULL: Json = {"type": ["integer", "null"]}
NUMBER: Json = {"type": "number"}
FLAG: Json = {"type": "boolean"}
STATUS = one("in_progress", "completed", "incomplete")
TOKEN: Json = {"token": TEXT, "logprob": NUMBER, "bytes": many(COUNT)}
LOGPROBS = many(obj(**TOKEN, top_logprobs=many(obj(**TOKEN))))
PART: Json = {
    "oneOf": [
        obj({"logprobs": LOGPROBS}, type=one("output_text"), text=TEXT, annotations=many({})),
        obj(type=one("reasoning_text"), text=TEXT),
    ]
}
ITEM: Json = {
    "oneOf": [
        obj(type=one("message"), id=TEXT, status=STATUS, role=one("assistant"), content=many(PART)),
        obj(type=one("function_call"), id=TEXT, call_id=TEXT, name=TEXT, arguments=TEXT, status=STATUS),
        obj({"content": many(PART)}, type=one("reasoning"), id=TEXT, summary=many({})),
    ]
}
TOOL = obj(
    type=one("function"),
    name=TEXT,
    description=TEXT_OR_NULL,
    parameters={"type": ["object", "null"]},
    strict={"type": ["boolean", "null"]},
)
USAGE = obj(
    input_tokens=COUNT,
    output_tokens=COUNT,
    total_tokens=COUNT,
    input_tokens_details=obj(cached_tokens=COUNT),
    output_tokens_details=obj(reasoning_tokens=COUNT),
)
RESPONSE = obj(
    id=TEXT,
    object=one("response"),
    created_at=COUNT,
    completed_at=COUNT_OR_NULL,
    status=TEXT,
    incomplete_details={"oneOf": [obj(reason=TEXT), {"type": "null"}]},
    model=TEXT,
    previous_response_id=TEXT_OR_NULL,
    instructions=TEXT_OR_NULL,
    output=many(ITEM),
    error={"oneOf": [obj(code=TEXT, message=TEXT), {"type": "null"}]},
    tools=many(TOOL),
    tool_choice={"oneOf": [one("none", "auto", "required"), obj(type=one("function", "allowed_tools"))]},
    truncation=one("auto", "disabled"),
    parallel_tool_calls=FLAG,
    text=obj({"verbosity": one("low", "medium", "high")}, format=obj(type=TEXT)),
    top_p=NUMBER,
    presence_penalty=NUMBER,
    frequency_penalty=NUMBER,
    top_logprobs=COUNT,
    temperature=NUMBER,
    reasoning={"oneOf": [obj(effort=TEXT_OR_NULL, summary=TEXT_OR_NULL), {"type": "null"}]},
    usage={"oneOf": [USAGE, {"type": "null"}]},
    max_output_tokens=COUNT_OR_NULL,
    max_tool_calls=COUNT_OR_NULL,
    store=FLAG,
    background=FLAG,
    service_tier=TEXT,
    metadata={"type": "object"},
    safety_identifier=TEXT_OR_NULL,
    prompt_cache_key=TEXT_OR_NULL,
)
PLACE: Json = {"item_id": TEXT, "output_index": COUNT}
IN_PART: Json = {**PLACE, "content_index": COUNT}
RESPONSE_EVENTS = ("created", "in_progress", "completed", "incomplete", "failed")
EVENTS: Json = {
    **{f"response.{word}": {"response": RESPONSE} for word in RESPONSE_EVENTS},
    **{f"response.output_item.{word}": {"output_index": COUNT, "item": ITEM} for word in ("added", "done")},
    **{f"response.content_part.{word}": {**IN_PART, "part": PART} for word in ("added", "done")},
    "response.output_text.delta": {**IN_PART, "delta": TEXT, "logprobs": LOGPROBS},
    "response.output_text.done": {**IN_PART, "text": TEXT, "logprobs": LOGPROBS},
    "response.reasoning_text.delta": {**IN_PART, "delta": TEXT},
    "response.reasoning_text.done": {**IN_PART, "text": TEXT},
    "response.function_call_arguments.delta": {**PLACE, "delta": TEXT},
    "response.function_call_arguments.done": {**PLACE, "arguments": TEXT},
}
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": text}


ASK = [user("How is the weather in Oslo?")]
CALLED = call("get_weather", '{"location": "Oslo"}')
# By the name of the suite's case: what is asked beside the model, what is said, and the kinds of the items.
CASES: dict[str, tuple[Json, str, list[str]]] = {
    "basic-response": ({"input": [user("Say hello.")]}, "Hello there!", ["message"]),
    "system-prompt": (
        {"input": [{"type": "message", "role": "system", "content": "Be a pirate."}, user("Say hello.")]},
        "Ahoy!",
        ["message"],
    ),
    "tool-calling": ({"input": ASK, "tools": [WEATHER]}, CALLED, ["function_call"]),
    "multi-turn": (
        {"input": [user("I am Tom."), {"type": "message", "role": "assistant", "content": "Hi!"}, user("Who am I?")]},
        "Tom.",
        ["message"],
    ),
    # Beyond the suite: all kinds of items in one answer, a choice that is forced, and fields that are repeated.
    "reasoning": (
        {"input": ASK, "tools": [WEATHER], "reasoning": {"effort": "low", "summary": "auto"}},
        f"<think>Hm.</think>Let me see. {CALLED}",
        ["reasoning", "message", "function_call"],
    ),
    "forced": (
        {"input": ASK, "tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}},
        CALLED,
        ["function_call"],
    ),
    "fields": (
        {"input": "Hi.", "instructions": "Be kind.", "presence_penalty": 0.5, "service_tier": "flex", "store": False}
        | {"metadata": {"a": "b"}, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        "Hello!",
        ["message"],
    ),
}


def check(schema: Json, value: Any) -> None:
    Draft202012Validator(schema).validate(value)


async def events_of(server: Live, body: Json) -> list[Json]:
    """The data of the events of a stream, each of which has its name twice and its number."""
    async with server.http.post(server.url + RESPONSES, json={**body, "stream": True}) as response:
        raw = (await response.read()).decode()
        assert response.status == 200 and response.content_type == "text/event-stream", raw
    found: list[Json] = []
    for number, block in enumerate(raw.strip().split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        check(obj(**EVENTS[event["type"]]), event)
        found.append(event)
    return found


def check_order(events: list[Json], response: Json) -> None:
    """Items open and close one after another, and what comes of them in pieces is what they hold at their end."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == response["status"]
    inner = events[2:-1]
    for index, item in enumerate(response["output"]):
        own = [event for event in inner if event["output_index"] == index]
        assert own == inner[: len(own)], "events of one item stand together"
        inner = inner[len(own) :]
        words = [event["type"].removeprefix("response.") for event in own]
        assert own[0]["item"]["id"] == own[-1]["item"]["id"] == item["id"] and own[-1]["item"] == item
        assert all(event["item_id"] == item["id"] for event in own[1:-1])
        grows = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        name = grows[item["type"]]
        pieces = "".join(event["delta"] for event in own if event["type"] == f"response.{name}.delta")
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert pieces == text
        deltas = [f"{name}.delta"] * words.count(f"{name}.delta")
        if item["type"] == "function_call":
            assert words == ["output_item.added", *deltas, f"{name}.done", "output_item.done"] and deltas
        else:
            opened, closed = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
            assert words == [*opened, *deltas, f"{name}.done", *closed]
    assert not inner


@pytest.mark.parametrize("case", CASES)
async def test_a_case_whole_and_streamed(case: str) -> None:
    asked, said, kinds = CASES[case]
    body = {"model": "demo", **asked}
    async with live(reasoning_parser="qwen3" if case == "reasoning" else "none") as server:
        with dictated(server, said):
            status, whole = await server.post(RESPONSES, body)
            assert status == 200, whole
            events = await events_of(server, body)
    streamed = events[-1]["response"]
    for response in (whole, streamed):
        check(RESPONSE, response)
        assert response["status"] == "completed" and [item["type"] for item in response["output"]] == kinds
        assert response["completed_at"] >= response["created_at"] and response["usage"]["output_tokens"] > 0
    check_order(events, streamed)
    for event in events[:2]:
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
    for name in ("presence_penalty", "metadata", "instructions", "store", "top_logprobs"):
        assert whole[name] == streamed[name] and (name not in asked or whole[name] == asked[name])


async def test_an_answer_that_is_cut_is_incomplete(server: Live) -> None:
    body = {"model": "demo", "input": "Count.", "max_output_tokens": 3}
    _, whole = await server.post(RESPONSES, body)
    events = await events_of(server, body)
    for response in (whole, events[-1]["response"]):
        check(RESPONSE, response)
        assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][-1]["status"] == "incomplete" and response["completed_at"] is None
    check_order(events, events[-1]["response"])


async def test_the_schemas_can_fail(server: Live) -> None:
    _, whole = await server.post(RESPONSES, {"input": "x", "max_output_tokens": 2, "tools": [WEATHER]})
    valid = Draft202012Validator(RESPONSE)
    assert valid.is_valid(whole)
    for name in RESPONSE["required"]:
        assert not valid.is_valid({key: value for key, value in whole.items() if key != name})
