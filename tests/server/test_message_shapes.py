"""Histories that templates are picky about, through every API family: what the model gets to read of them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from tests.server.dictate import dictated
from tests.server.support import Live, live, served_model
from tests.text import family_templates as families

# What concatenates arguments, and no more than that.
CONCATENATING = """{%- for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '[call]' + call.function.name + '\\n' + call.function.arguments + '[/call]' }}
{%- endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
ARGUMENTS = {"city": "Lyon", "days": 3}
ARGUMENTS_TEXT = '{"city": "Lyon", "days": 3}'
THOUGHT = "Let me think."

Json = dict[str, Any]


def says(role: str, text: str) -> Json:
    return {"role": role, "content": text}


# One history in the words of each family: path, body.
TOOL_LOOP: dict[str, Json] = {
    "/v1/chat/completions": {
        "messages": [
            says("user", "Rain?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS_TEXT}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "No rain."},
        ]
    },
    "/v1/messages": {
        "messages": [
            says("user", "Rain?"),
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "No rain."}]},
        ]
    },
    "/v1/responses": {
        "input": [
            says("user", "Rain?"),
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS_TEXT},
            {"type": "function_call_output", "call_id": "c1", "output": "No rain."},
        ]
    },
    "/api/chat": {
        "messages": [
            says("user", "Rain?"),
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}]},
            {"role": "tool", "tool_name": "weather", "content": "No rain."},
        ]
    },
}
THOUGHT_ALONE: dict[str, Json] = {
    "/v1/chat/completions": {
        "messages": [
            says("user", "One"),
            {"role": "assistant", "content": None, "reasoning_content": THOUGHT},
            says("user", "Two"),
        ]
    },
    "/v1/messages": {
        "messages": [
            says("user", "One"),
            {"role": "assistant", "content": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]},
            says("user", "Two"),
        ]
    },
    "/v1/responses": {
        "input": [
            says("user", "One"),
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
            says("user", "Two"),
        ]
    },
    "/api/chat": {
        "messages": [says("user", "One"), {"role": "assistant", "thinking": THOUGHT}, says("user", "Two")],
    },
}
LATE_SYSTEM = [says("user", "One"), says("assistant", "Hello"), says("system", "Be brief."), says("user", "Two")]
SYSTEMS: dict[str, Json] = {
    "/v1/chat/completions": {"messages": [says("system", "First."), *LATE_SYSTEM]},
    "/v1/messages": {"system": "First.", "messages": LATE_SYSTEM},
    "/v1/responses": {"instructions": "First.", "input": LATE_SYSTEM},
    "/api/chat": {"messages": [says("system", "First."), *LATE_SYSTEM]},
}


async def prompt_of(server: Live, path: str, body: Json) -> str:
    """What the model reads for a request that is answered."""
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    with dictated(server, "ok") as requests:
        status, answer = await server.post(path, {"model": "demo", "stream": False, limit: 16, **body})
        assert status == 200, answer
    return server.state.tokenizer.decode(requests[0].prompt_token_ids)


def model(source: str) -> Any:
    return served_model(chat_template=ChatTemplate({"default": source}, {"bos_token": "", "eos_token": "|"}))


async def test_a_past_call_stands_where_content_must_be_none() -> None:
    async with live(model=model(families.DEEPSEEK_R1)) as server:
        for path, body in TOOL_LOOP.items():
            text = await prompt_of(server, path, body)
            assert f"<|call|>function<|sep|>weather\n```json\n{ARGUMENTS_TEXT}\n```" in text, path
            assert "<|out|>No rain." in text and "None" not in text, path


async def test_arguments_are_text_where_they_are_concatenated() -> None:
    async with live(model=model(CONCATENATING)) as server:
        for path, body in TOOL_LOOP.items():
            assert f"[call]weather\n{ARGUMENTS_TEXT}[/call]" in await prompt_of(server, path, body), path


@pytest.mark.parametrize(
    "source", [families.QWEN3, families.QWEN35, families.GEMMA2, families.MISTRAL_V3, CONCATENATING]
)
async def test_a_turn_of_reasoning_alone_is_an_empty_turn(source: str) -> None:
    async with live(model=model(source)) as server:
        for path, body in THOUGHT_ALONE.items():
            text = await prompt_of(server, path, body)
            assert text.index("One") < text.index("Two") and "None" not in text, path


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None},
        {"content": None, "tool_calls": []},
        {"content": None, "refusal": None},
        {"reasoning_content": THOUGHT},
        {},
    ],
    ids=str,
)
async def test_empty_turns_of_a_chat(turn: Json) -> None:
    async with live() as server:
        chat = [says("user", "One"), {"role": "assistant", **turn}, says("user", "Two")]
        text = await prompt_of(server, "/v1/chat/completions", {"messages": chat})
        empty = [says("user", "One"), says("assistant", ""), says("user", "Two")]
        assert text == await prompt_of(server, "/v1/chat/completions", {"messages": empty})
        nothing = [{"role": "user", "content": None}, *TOOL_LOOP["/v1/chat/completions"]["messages"][1:2]]
        nothing += [{"role": "tool", "tool_call_id": "c1", "content": None}]
        assert "None" not in await prompt_of(server, "/v1/chat/completions", {"messages": nothing})
        refused = [says("user", "One"), {"role": "assistant", "content": None, "refusal": "I must not."}]
        assert "I must not." in await prompt_of(server, "/v1/chat/completions", {"messages": [*refused, chat[-1]]})


@pytest.mark.parametrize("source", [families.GEMMA2, families.GEMMA3, families.MISTRAL_V3, families.QWEN35])
async def test_a_late_system_is_part_of_the_user_beside_it(source: str) -> None:
    async with live(model=model(source)) as server:
        for path, body in SYSTEMS.items():
            text = await prompt_of(server, path, body)
            assert "Be brief.\n\nTwo" in text and text.count("First.") == 1, path
            places = [text.index(word) for word in ("One", "Hello", "Be brief.")]
            assert places == sorted(places), path


async def test_what_claude_code_and_codex_send_under_a_strict_template() -> None:
    async with live(model=model(families.QWEN35)) as server:
        messages = [says("user", "hi"), says("system", "Agents.")]
        text = await prompt_of(server, "/v1/messages", {"system": "First.", "messages": messages})
        assert "hi\n\nAgents." in text
        for first, second in (("system", "system"), ("system", "developer"), ("developer", "developer")):
            lead = [says(first, "First."), says(second, "Second.")]
            text = await prompt_of(server, "/v1/chat/completions", {"messages": [*lead, says("user", "hi")]})
            assert text.count("system") == 1 and "First.\n\nSecond." in text
            text = await prompt_of(server, "/v1/responses", {"input": [*lead, says("user", "hi")]})
            assert text.count("system") == 1 and "First.\n\nSecond." in text


async def test_a_refusal_of_the_template_keeps_its_words() -> None:
    source = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no bad words') }}{% endif %}" + families.CHATML
    async with live(model=model(source)) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": [says("user", "bad")]}),
            ("/v1/messages", {"messages": [says("user", "bad")], "max_tokens": 1}),
            ("/v1/responses", {"input": "bad"}),
            ("/api/chat", {"messages": [says("user", "bad")]}),
        ):
            status, answer = await server.post(path, {"model": "demo", **body})
            assert status == 400 and "no bad words" in str(answer), path


async def test_the_prompt_of_a_prefill_ends_inside_of_the_reasoning() -> None:
    for source in (families.QWEN3, families.QWEN35, families.DEEPSEEK_R1):
        async with live(model=model(source)) as server:
            chat = [says("user", "6 times 7?"), says("assistant", "<think>\nLet me see, so")]
            body = {"messages": chat, "continue_final_message": True}
            status, answer = await server.post("/v1/chat/completions/render", body)
            assert status == 200
            assert answer["prompt"].endswith("<think>\nLet me see, so") and answer["prompt"].count("<think>") == 1
            thinking = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Let me see, so"}]}
            prefill = {"messages": [chat[0], thinking], "chat_template_kwargs": {"enable_thinking": True}}
            assert (await prompt_of(server, "/v1/messages", prefill)).endswith("<think>\nLet me see, so")
