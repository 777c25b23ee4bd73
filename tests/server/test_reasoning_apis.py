"""Reasoning as every API family shows it, whole and streamed: opened by the prompt, closed twice, never, or again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from tests.server.dictate import CUTS, dictated
from tests.server.support import Live, live, served_model
from tests.server.test_anthropic import joined, parse_named

Json = dict[str, Any]
# Content, reasoning, and the names of the calls.
Outcome = tuple[str, str, list[str]]
HI = [{"role": "user", "content": "hi"}]
NAME, SCHEMA = "f", {"type": "object", "properties": {"cmd": {"type": "string"}}}
FUNCTION = {"name": NAME, "parameters": SCHEMA}
CALL = '<tool_call>\n{"name": "f", "arguments": {"cmd": "ls"}}\n</tool_call>'
# Opens the reasoning where it is to think, and shows none where it is not.
OPENS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% if not loop.last or add_generation_prompt %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
    "{% if tools %}{% endif %}"
)
ROWS: list[tuple[str, Outcome]] = [
    ("Hm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
    ("<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
    ("Hm.</think></think>Yes.", ("Yes.", "Hm.", [])),
    ("Hm.</think>Yes</think> and no.", ("Yes and no.", "Hm.", [])),
    ("Hm.", ("", "Hm.", [])),
    ("Hm.</think>", ("", "Hm.", [])),
    ("</think>Yes.", ("Yes.", "", [])),
    ("Hm.</think>" + CALL, ("", "Hm.", [NAME])),
    ("Hm.\n" + CALL, ("", "Hm.", [NAME])),
    (CALL, ("", "", [NAME])),
    (f"Say {CALL}? No.</think>Yes.", ("Yes.", f"Say {CALL}? No.", [])),
    # Once it is over, a mark that opens it again is text, as other servers have it.
    ("Hm.</think>Yes. <think>Hm?</think> No.", ("Yes. <think>Hm?</think> No.", "Hm.", [])),
    ("Hm.</think>Yes. <think>Hm?", ("Yes. <think>Hm?", "Hm.", [])),
    (f"Hm.</think><think>Hm?</think>{CALL}", ("<think>Hm?</think>", "Hm.", [NAME])),
]
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 300},
    "/v1/messages": {
        "messages": HI,
        "tools": [{"name": NAME, "input_schema": SCHEMA}],
        "max_tokens": 300,
        "thinking": {"type": "adaptive"},
    },
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 300},
    "/api/chat": {
        "messages": HI,
        "tools": [{"type": "function", "function": FUNCTION}],
        "options": {"num_predict": 300},
        "stream": False,
        "think": True,
    },
}


def serve(**options: Any) -> Any:
    model = served_model(chat_template=ChatTemplate({"default": OPENS}, {}), max_model_len=1024)
    return live(model=model, tool_call_parser="hermes", reasoning_parser="qwen3", **options)


def of_chat(message: Json) -> Outcome:
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return message.get("content") or "", message.get("reasoning") or message.get("thinking") or "", calls


def of_blocks(blocks: list[Json]) -> Outcome:
    content = reasoning = ""
    calls: list[str] = []
    for block in blocks:
        match block["type"]:
            case "text":
                content += block["text"]
            case "thinking":
                assert block["signature"], "a thought that no SDK keeps"
                reasoning += block["thinking"]
            case "tool_use":
                calls.append(block["name"])
            case "message":
                content += block["content"][0]["text"]
            case "reasoning":
                reasoning += block["content"][0]["text"]
            case "function_call":
                calls.append(block["name"])
    return content, reasoning, calls


async def whole(server: Live, path: str, body: Json) -> Outcome:
    status, answer = await server.post(path, body)
    assert status == 200, answer
    match path:
        case "/v1/messages":
            return of_blocks(answer["content"])
        case "/v1/responses":
            return of_blocks(answer["output"])
        case "/api/chat":
            return of_chat(answer["message"])
    return of_chat(answer["choices"][0]["message"])


async def streamed(server: Live, path: str, body: Json) -> Outcome:
    async with server.http.post(server.url + path, json={**body, "stream": True}) as response:
        raw = await response.read()
    assert response.status == 200, raw
    if path == "/v1/messages":
        events = parse_named(raw)
        last = ""
        for event in events:
            # A thought is signed before its block stops.
            if event["type"] == "content_block_stop" and events[0]["type"] == "message_start":
                assert last != "thinking_delta"
            last = event.get("delta", {}).get("type", event["type"])
        return of_blocks(joined(events)["content"])
    if path == "/v1/responses":
        return of_blocks(parse_named(raw)[-1]["response"]["output"])
    message: Json = {"content": "", "reasoning": "", "tool_calls": []}
    for line in raw.decode().splitlines():
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        delta = event["message"] if path == "/api/chat" else event["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or delta.get("thinking") or ""
        message["tool_calls"] += [call for call in delta.get("tool_calls", ()) if "name" in call["function"]]
    return of_chat(message)


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_reasoning(path: str) -> None:
    async with serve() as server:
        for text, expected in ROWS:
            for cut in CUTS:
                with dictated(server, text, cut=cut):
                    assert await whole(server, path, BODIES[path]) == expected, text
                    assert await streamed(server, path, BODIES[path]) == expected, text


OFF: dict[str, Json] = {
    "/v1/chat/completions": {"chat_template_kwargs": {"enable_thinking": False}},
    "/v1/messages": {"thinking": {"type": "disabled"}},
    "/v1/responses": {"chat_template_kwargs": {"enable_thinking": False}},
    "/api/chat": {"think": False},
}
# Of the other families the operator's holds.
BUDGETS: dict[str, Json] = {
    "/v1/chat/completions": {"thinking_token_budget": 6},
    "/v1/messages": {"thinking": {"type": "enabled", "budget_tokens": 6}},
}


@pytest.mark.parametrize("path", BODIES)
async def test_thinking_off_and_held_to_a_budget(path: str) -> None:
    async with serve(reasoning_budget=None if path in BUDGETS else 6) as server:
        with dictated(server, f"Yes. {CALL}", cut="characters"):
            body = BODIES[path] | OFF[path]
            assert await whole(server, path, body) == await streamed(server, path, body) == ("Yes.", "", [NAME])
        # Nothing is dictated here: the budget writes into the answer.
        _, reasoning, _ = await whole(server, path, BODIES[path] | BUDGETS.get(path, {}))
        tokens = server.state.tokenizer.encode(reasoning, add_special_tokens=False)
        # Bytes that are no text count more than once; without a budget it is 300 tokens.
        assert 0 < len(tokens) <= 60, reasoning


THOUGHT = "Let me see, so"


@pytest.mark.parametrize("inner", [f"<think>\n{THOUGHT}", f"<think>\nHm.\n</think>\n\n{THOUGHT}"])
async def test_a_prefill_of_messages(inner: str) -> None:
    """Anthropic's way to begin an answer, inside of the reasoning and behind it."""
    inside = "</think>" not in inner
    body = BODIES["/v1/messages"] | {"messages": [*HI, {"role": "assistant", "content": inner}]}
    said = " it is.\n</think>\n\n42" if inside else " 42"
    async with serve() as server:
        for cut in CUTS:
            with dictated(server, said, cut=cut):
                for found in (await whole(server, "/v1/messages", body), await streamed(server, "/v1/messages", body)):
                    content, reasoning, calls = found
                    assert (content.strip(), reasoning.strip(), calls) == ("42", "it is." if inside else "", [])
