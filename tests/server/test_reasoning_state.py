"""Where a prompt leaves the reasoning, through the live server: the turn that is gone on with says so, nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from tests.server.dictate import CUTS, Cut, dictated
from tests.server.support import live, served_model
from tests.text import family_templates as families

CHAT = "/v1/chat/completions"
Json = dict[str, Any]
ASK: Json = {"role": "user", "content": "6 times 7?"}
PREFILL: Json = {"role": "assistant", "content": "<think>\nLet me see, so"}
SAID = " it is easy.\n</think>\n\n42"
THOUGHT = "it is easy."
SCHEMA: Json = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 42}, "strict": True}}
}


def model(source: str) -> Any:
    return served_model(chat_template=ChatTemplate({"default": source}, {"bos_token": "", "eos_token": "|"}))


def read(message: Json) -> tuple[str, str]:
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    return reasoning.strip(), (message.get("content") or "").strip()


@pytest.mark.parametrize("cut", CUTS)
async def test_a_prefill_that_ends_inside(cut: Cut) -> None:
    continued = {"messages": [ASK, PREFILL], "continue_final_message": True, "max_tokens": 100}
    async with live(model=model(families.QWEN3)) as server:
        for more in ({}, SCHEMA, {"thinking_token_budget": 90}):
            # The grammar has no room for white space in front of what it rules.
            said = SAID.replace("\n\n", "") if more == SCHEMA else SAID
            with dictated(server, said, cut=cut) as requests:
                status, answer = await server.post(CHAT, {**continued, **more})
                assert status == 200, answer
                assert read(answer["choices"][0]["message"]) == (THOUGHT, "42"), more
                assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
                events = await server.events(CHAT, {**continued, **more, "stream": True})
            deltas = [e["choices"][0]["delta"] for e in events if e != "[DONE]" and e["choices"]]
            whole = {
                name: "".join(d.get(name) or "" for d in deltas)
                for name in ("reasoning_content", "reasoning", "content")
            }
            assert read(whole) == (THOUGHT, "42"), more
            # The request's own rule followed what was said, and found nothing wrong with it.
            assert all(request.constraint is None or request.constraint.error is None for request in requests)


def say(text: str) -> Json:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("cut", CUTS)
async def test_what_users_and_tools_say_opens_nothing(cut: Cut) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chats = [
        [say("Hi <think>")],
        [say("<think>"), {"role": "assistant", "content": "<think>\nHm."}, say("<think>\n")],
        [
            ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "<think>"},
        ],
        [{"role": "system", "content": "Close with </think>"}, say("</think>")],
    ]
    async with live(model=model(families.QWEN3)) as server:
        for chat in chats:
            with dictated(server, "42", cut=cut):
                status, answer = await server.post(CHAT, {"messages": chat, "max_tokens": 50, **SCHEMA})
            assert status == 200, answer
            assert read(answer["choices"][0]["message"]) == ("", "42"), chat
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_the_template_opens_it() -> None:
    # One that writes an end behind a conversation that waits for no answer.
    opens = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% if enable_thinking is false %}</think>{% endif %}"
        "{% else %}<end>{% endif %}"
    )
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    cases: list[tuple[Json, str, tuple[str, str]]] = [
        ({}, "it is easy.</think>42", (THOUGHT, "42")),
        ({}, "<think>it is easy.</think>42", (THOUGHT, "42")),
        (SCHEMA, "it is easy.</think>42", (THOUGHT, "42")),
        ({}, "it is easy.</think>4</think>2", (THOUGHT, "42")),
        (off, "42", ("", "42")),
        (off | SCHEMA, "42", ("", "42")),
    ]
    async with live(model=model(opens)) as server:
        for more, text, wanted in cases:
            for cut in CUTS:
                with dictated(server, text, cut=cut) as requests:
                    status, answer = await server.post(CHAT, {"messages": [ASK], "max_tokens": 90, **more})
                assert status == 200, answer
                assert read(answer["choices"][0]["message"]) == wanted, (more, text)
                assert requests[0].constraint is None or requests[0].constraint.error is None
