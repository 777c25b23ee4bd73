"""Tools and reasoning over the wire: calls as OpenAI's clients read them, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from engine.text.chat_template import ChatTemplate
from server.parsers import registry, think
from tests.server.support import DEMO, Live, live, served_model, teach
from tests.server.test_logprobs import device

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = PARAMETERS) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("get_weather"), tool("get_time", {"type": "object", "properties": {}, "additionalProperties": False})]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def joined(events: list[Any]) -> dict[str, Any]:
    """The message that the deltas of choice 0 add up to, with the order of their fields checked."""
    content, reasoning, calls, reasons = "", "", [], []
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and events[-1] == "[DONE]"
    for event in events[1:-1]:
        [choice] = event["choices"]
        assert not reasons, "nothing follows the finish reason"
        delta = choice["delta"]
        content += delta.get("content", "")
        reasoning += delta.get("reasoning", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls) and call["type"] == "function"
                assert call["function"]["arguments"] == ""
                calls.append((call["function"]["name"], ""))
            else:
                assert set(call) == {"index", "function"} and call["index"] == len(calls) - 1
                assert set(call["function"]) == {"arguments"} and call["function"]["arguments"]
                calls[-1] = (calls[-1][0], calls[-1][1] + call["function"]["arguments"])
        if choice["finish_reason"] is not None:
            reasons.append(choice["finish_reason"])
    return {"content": content, "reasoning": reasoning, "calls": calls, "finish_reason": reasons[0]}


def told(body: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The same of an answer that came whole."""
    choice = body["choices"][index]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert message.get("reasoning") == message.get("reasoning_content")
    assert ("tool_calls" in message) == bool(calls)
    assert message["content"] is not None or calls
    assert len({call["id"] for call in calls}) == len(calls)
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning") or "",
        "calls": [(call["function"]["name"], call["function"]["arguments"]) for call in calls],
        "finish_reason": choice["finish_reason"],
    }


async def both_ways(server: Live, body: dict[str, Any]) -> dict[str, Any]:
    status, whole = await server.post(CHAT, body)
    assert status == 200, whole
    found = told(whole)
    streamed = joined(await server.events(CHAT, body))
    assert streamed == found
    return found


async def say(server: Live, text: str, body: dict[str, Any]) -> dict[str, Any]:
    """Let the device say a text and its EOS, whatever the prompt is, and read the answer both ways."""
    status, prompt = await server.post("/tokenize", {key: body[key] for key in ("messages", "tools") if key in body})
    if body.get("tool_choice") == "none":
        status, prompt = await server.post("/tokenize", {"messages": body["messages"]})
    assert status == 200, prompt
    teach(server, text, prompt["count"])
    return await both_ways(server, body)


# ---- forced


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [("required", False, {"get_weather", "get_time"}), (WEATHER, True, {"get_weather"}), ("required", True, None)],
)
async def test_forced_calls_keep_their_schema(
    server: Live, choice: Any, parallel: bool, names: set[str] | None
) -> None:
    for seed in range(6):
        body = {
            "messages": [{"role": "user", "content": f"hi {seed}"}],
            "tools": TOOLS,
            "tool_choice": choice,
            "parallel_tool_calls": parallel,
            "seed": seed,
            "max_tokens": 300 if names else 150,
        }
        found = await both_ways(server, body)
        assert found["content"] == "" and found["calls"]
        if names is None:
            continue  # as many calls as the hash of a fake device likes
        [(name, arguments)] = found["calls"]
        assert found["finish_reason"] == "tool_calls" and name in names
        jsonschema.validate(json.loads(arguments), PARAMETERS if name == "get_weather" else {"maxProperties": 0})
    status, whole = await server.post(CHAT, body)
    assert status == 200 and whole["choices"][0]["message"]["content"] is None
    await server.all_free()


async def test_allowed_tools_and_several_choices(server: Live) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}
    body = {"messages": HI, "tools": TOOLS, "tool_choice": allowed, "parallel_tool_calls": False, "seed": 3, "n": 3}
    status, whole = await server.post(CHAT, body)
    assert status == 200, whole
    for index in range(3):
        found = told(whole, index)
        assert [name for name, _ in found["calls"]] == ["get_weather"] and found["finish_reason"] == "tool_calls"


# ---- by the model's own choice


async def test_calls_are_read_out_of_the_text(server: Live) -> None:
    weather = ("get_weather", '{"city": "Paris"}')
    body = {"messages": HI, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
    found = await say(server, CALL, body)
    assert found == {"content": "", "reasoning": "", "calls": [weather], "finish_reason": "tool_calls"}
    found = await say(server, f"Let me look.\n{CALL}\n{CALL}", body)
    assert (found["content"], found["calls"]) == ("Let me look.", [weather, weather])
    found = await say(server, f"{CALL}\n{CALL}", {**body, "parallel_tool_calls": False})
    assert found["calls"] == [weather] and found["finish_reason"] == "tool_calls"
    found = await say(server, "It <tool is fine.", body)
    assert (found["content"], found["calls"], found["finish_reason"]) == ("It <tool is fine.", [], "stop")
    # The client's own repair answers what nobody declared.
    for name in ("rm", "GET_weather"):
        found = await say(server, CALL.replace("get_weather", name), body)
        assert (found["content"], found["calls"]) == ("", [(name, weather[1])])
    # Nobody looks for calls where there must be none.
    found = await say(server, CALL, {**body, "tool_choice": "none"})
    assert (found["content"], found["calls"], found["finish_reason"]) == (CALL, [], "stop")


async def test_what_comes_beside_the_text_is_there_once(server: Live) -> None:
    body = {"messages": HI, "tools": TOOLS, "max_tokens": 120, "return_token_ids": True, "logprobs": True}
    await say(server, f"Look.\n{CALL}", {**body, "temperature": 0})
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await server.events(CHAT, {**body, "temperature": 0, "stream_options": options})
    status, whole = await server.post(CHAT, {**body, "temperature": 0})
    assert status == 200
    chunks = [event for event in events[1:-1] if event["choices"]]
    ids = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert events[-2]["usage"] == whole["usage"]


async def test_structure_or_calls(server: Live) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    body = {
        "messages": HI,
        "tools": TOOLS,
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    kinds = set()
    for seed in range(12):
        found = await both_ways(server, {**body, "messages": [{"role": "user", "content": f"hi {seed}"}]})
        kinds.add(found["finish_reason"])
        if found["calls"]:
            assert found["content"] == "" and found["finish_reason"] == "tool_calls"
        else:
            jsonschema.validate(json.loads(found["content"]), schema)
    assert kinds == {"stop", "tool_calls"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": 5}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
    ({"tools": [tool("f", [])]}, "tools[0].function.parameters"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 2}, "min_tokens"),
    ({"tools": [tool("f", {"type": "nothing"})], "tool_choice": "required"}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
]


async def test_bad_tools_are_400(server: Live) -> None:
    for fields, param in REFUSED:
        for stream in (False, True):
            status, body = await server.post(CHAT, {"messages": HI, **fields, "stream": stream})
            assert status == 400 and body["error"]["param"] == param, (fields, body)


async def test_a_template_of_which_no_calls_are_known() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, {})
    async with live(model=served_model(chat_template=template)) as server:
        for choice in ("auto", "required"):
            status, body = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": choice})
            assert status == 400 and "--tool-call-parser" in body["error"]["message"]
        status, body = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "none", "max_tokens": 2})
        assert status == 200
    async with live(model=served_model(chat_template=template), tool_call_parser="llama3_json") as server:
        status, body = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": WEATHER, "seed": 1})
        assert status == 200 and told(body)["calls"][0][0] == "get_weather"
    async with live(tool_call_parser="none") as server:
        found = await say(server, CALL, {"messages": HI, "tools": TOOLS, "temperature": 0, "max_tokens": 99})
        assert (found["content"], found["calls"]) == (CALL, [])


# ---- reasoning

BODY: dict[str, Any] = {"messages": HI, "temperature": 0, "max_tokens": 120}


async def test_reasoning_goes_out_under_both_names() -> None:
    async with live(reasoning_parser="qwen3") as server:
        found = await say(server, "<think>\nHm, hm.\n</think>\n\nYes!", BODY)
        assert found == {"content": "Yes!", "reasoning": "Hm, hm.", "calls": [], "finish_reason": "stop"}
        found = await say(server, f"<think>I need it.</think>{CALL}", {**BODY, "tools": TOOLS})
        assert found["reasoning"] == "I need it." and found["finish_reason"] == "tool_calls"
        assert (await say(server, "No thought.", BODY))["content"] == "No thought."
        found = await say(server, "<think>Cut off", BODY)
        assert (found["content"], found["reasoning"]) == ("", "Cut off")


async def test_a_prompt_that_opens_the_reasoning() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    model = served_model(chat_template=ChatTemplate({"default": source}, {}))
    async with live(model=model) as server:
        assert server.state.reasoning_family is think.DEEPSEEK_R1
        found = await say(server, "Hm.</think>Yes.", BODY)
        assert (found["reasoning"], found["content"]) == ("Hm.", "Yes.")
        # A grammar waits for the end of the reasoning.
        server.device.script = None
        choice = {**BODY, "structured_outputs": {"choice": ["tea", "coffee"]}}
        found = await both_ways(server, choice)
        assert found["content"] == "" and found["finish_reason"] == "length" and found["reasoning"]


async def test_markers_that_are_special_tokens_are_read_and_eos_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    family = think.family("special", "<|im_start|>", "<|endoftext|>")
    monkeypatch.setitem(registry.REASONING_PARSERS, "special", family)
    async with live(reasoning_parser="special") as server:
        found = await say(server, "<|im_start|>I think.<|endoftext|>So it is.", BODY)
        assert (found["reasoning"], found["content"]) == ("I think.", "So it is.")
        # The grammar may begin with the reasoning, which is one token, or without it.
        server.device.script = None
        body = {"messages": HI, "max_tokens": 60, "seed": 1, "structured_outputs": {"choice": ["tea", "coffee"]}}
        prompts = [[{"role": "user", "content": f"hi {turn}"}] for turn in range(24)]
        answers = [await both_ways(server, {**body, "messages": prompt}) for prompt in prompts]
        assert all(answer["reasoning"] or answer["content"] in ("tea", "coffee") for answer in answers)
        assert any(answer["reasoning"] for answer in answers) and any(answer["content"] for answer in answers)
    async with live() as server:
        assert (await say(server, "<|im_start|>Plain.<|endoftext|>", BODY))["content"] == "Plain."


# ---- with a model that means something


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[Live]:
    async with live(make_device=device, num_pages=512) as server:
        yield server


def weather_prompt() -> dict[str, Any]:
    [item] = [item for item in json.loads((DEMO / "prompts.json").read_text()) if item["name"] == "tool"]
    return {"messages": item["messages"], "tools": item["tools"]}


async def test_a_tool_loop_with_the_real_client(demo: Live) -> None:
    prompt = weather_prompt()
    async with demo.openai() as client:
        first = await client.chat.completions.create(model="demo", temperature=0, **prompt)
        [choice] = first.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls
        assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny", "temperature": 21}'}
        messages = [*prompt["messages"], choice.message.model_dump(exclude_none=True), result]
        second = await client.chat.completions.create(
            model="demo", temperature=0, messages=messages, tools=prompt["tools"]
        )
        [answer] = second.choices
        assert answer.finish_reason == "stop" and not answer.message.tool_calls
        assert answer.message.content and "sunny" in answer.message.content

        stream = await client.chat.completions.create(model="demo", temperature=0, stream=True, **prompt)
        pieces, reasons = [], []
        async for chunk in stream:
            for part in chunk.choices:
                pieces += part.delta.tool_calls or []
                reasons.append(part.finish_reason)
        assert pieces[0].id and pieces[0].function.name == "get_weather" and pieces[0].function.arguments == ""
        assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
        assert reasons[-1] == "tool_calls"


async def test_the_demo_model_is_forced(demo: Live) -> None:
    body = {**weather_prompt(), "tool_choice": "required", "temperature": 1.5, "seed": 4, "max_tokens": 200}
    body["messages"] = [{"role": "user", "content": "Tell me a story."}]
    body["parallel_tool_calls"] = False
    found = await both_ways(demo, body)
    assert found["finish_reason"] == "tool_calls" and found["calls"][0][0] == "get_weather"
    assert isinstance(json.loads(found["calls"][0][1])["city"], str)
