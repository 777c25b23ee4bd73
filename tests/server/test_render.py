"""/v1/chat/completions/render and /apply-template: the prompt as the model will see it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.support import Live, tokenizer
from tests.server.test_errors import check_shape

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("path", [f"{CHAT}/render", "/apply-template"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"add_generation_prompt": False},
        {"messages": [*HI, {"role": "assistant", "content": "He"}], "continue_final_message": True},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, *HI]},
    ],
    ids=range(6),
)
async def test_it_is_the_prompt_of_a_chat(server: Live, path: str, fields: dict[str, Any]) -> None:
    body = {"messages": HI, "max_tokens": 1, **fields}
    status, rendered = await server.post(path, body)
    assert status == 200 and set(rendered) == {"model", "prompt", "token_ids"}
    status, answer = await server.post(CHAT, {**body, "return_token_ids": True})
    assert answer["prompt_token_ids"] == rendered["token_ids"]
    assert tokenizer().decode(rendered["token_ids"], skip_special_tokens=False) == rendered["prompt"]
    assert ("get_weather" in rendered["prompt"]) is False and ('"f"' in rendered["prompt"]) is (
        "tools" in fields and "tool_choice" not in fields
    )


async def test_bad_bodies(server: Live) -> None:
    for path in (f"{CHAT}/render", "/apply-template"):
        for fields, param in (
            ({}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": HI, "tools": 5}, "tools"),
            ({"messages": HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ):
            assert check_shape(*await server.post(path, fields))["param"] == param
        check_shape(*await server.post(path, {"messages": HI, "model": "nope"}), expected=404)
        assert (await server.post(path, {"messages": HI}))[0] == 200
    assert server.device.num_steps == 0
