"""litellm under its three names for servers like this one."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest

from tests.clients.common import (
    MIA,
    MODEL,
    PERSON_PROMPT,
    SUM,
    SUM_ANSWER,
    WEATHER,
    WEATHER_PROMPT,
    WEATHER_TOOL,
    Person,
    cell,
    user,
)

CLIENT = "litellm"
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])


def ask(url: str, provider: str, messages: list[Any], **fields: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL}",
        api_base=f"{url}/v1",
        api_key="none",
        messages=messages,
        temperature=0,
        num_retries=0,
        **fields,
    )


@cell(CLIENT, "text")
@PROVIDERS
def test_text(url: str, provider: str) -> None:
    answer = ask(url, provider, user(SUM))
    assert answer.choices[0].message.content == SUM_ANSWER and answer.usage.completion_tokens > 0


@cell(CLIENT, "text")
def test_text_completion(url: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{url}/v1",
        api_key="none",
        prompt="Once upon",
        temperature=0,
        max_tokens=8,
    )
    assert answer.choices[0].text.startswith(" a time")


@cell(CLIENT, "stream")
@PROVIDERS
def test_stream(url: str, provider: str) -> None:
    chunks = list(ask(url, provider, user(SUM), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SUM_ANSWER


@cell(CLIENT, "tool loop")
@PROVIDERS
def test_tool_loop(url: str, provider: str) -> None:
    messages = user(WEATHER_PROMPT)
    first = ask(url, provider, messages, tools=[WEATHER_TOOL], tool_choice="required").choices[0]
    [call] = first.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": json.dumps(WEATHER)}]
    second = ask(url, provider, messages, tools=[WEATHER_TOOL]).choices[0]
    assert "sunny" in second.message.content


@cell(CLIENT, "structured object")
@PROVIDERS
def test_structured_object(url: str, provider: str) -> None:
    answer = ask(url, provider, user(PERSON_PROMPT), response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == MIA


@cell(CLIENT, "logprobs")
@PROVIDERS
def test_logprobs(url: str, provider: str) -> None:
    answer = ask(url, provider, user(SUM), logprobs=True, top_logprobs=2).choices[0]
    assert "".join(token.token for token in answer.logprobs.content).startswith(SUM_ANSWER)
