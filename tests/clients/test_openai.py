"""The `openai` package for Python: chat, completions and responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.common import (
    MIA,
    MODEL,
    PERSON_PROMPT,
    SUM,
    SUM_ANSWER,
    WEATHER,
    WEATHER_PARAMETERS,
    WEATHER_PROMPT,
    WEATHER_TOOL,
    Person,
    cell,
    user,
)

CHAT = "openai (Python)"
RESPONSES = "openai (Python), responses"
# The name beside the type, as the Responses API has it.
FLAT_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER_PARAMETERS, "strict": False}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@cell(CHAT, "text")
def test_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user(SUM), temperature=0)
    assert answer.choices[0].message.content == SUM_ANSWER and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    completion = client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=8, echo=True
    )
    assert completion.choices[0].text.startswith("Once upon a time")


@cell(CHAT, "text")
def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=user(SUM), temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as lost:
        client.chat.completions.create(model="gpt-9", messages=user(SUM))
    assert lost.value.code == "model_not_found"


@cell(CHAT, "stream")
def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=user(SUM), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SUM_ANSWER
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({chunk.id for chunk in chunks}) == 1
    with client.chat.completions.stream(model=MODEL, messages=user(SUM), temperature=0) as events:
        assert "".join(event.delta for event in events if event.type == "content.delta") == SUM_ANSWER
        assert events.get_final_completion().choices[0].message.content == SUM_ANSWER
    pieces = client.completions.create(model=MODEL, prompt="Once upon", temperature=0, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces).startswith(" a time")


@cell(CHAT, "tool loop")
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_tool_loop(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [WEATHER_TOOL]}
    messages = user(WEATHER_PROMPT)
    first = client.chat.completions.create(messages=messages, tool_choice=choice, **fields).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None and first.message.tool_calls
    [call] = first.message.tool_calls
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(WEATHER)},
    ]
    second = client.chat.completions.create(messages=messages, **fields).choices[0]
    assert second.finish_reason == "stop" and "sunny" in (second.message.content or "")
    with client.chat.completions.stream(messages=user(WEATHER_PROMPT), tool_choice=choice, **fields) as events:
        arguments = "".join(e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta")
    assert json.loads(arguments) == {"city": "Paris"}


@cell(CHAT, "structured object")
def test_structured_object(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=user(PERSON_PROMPT), temperature=0, response_format=Person
    )
    assert parsed.choices[0].message.parsed == MIA
    with client.chat.completions.stream(
        model=MODEL, messages=user(PERSON_PROMPT), temperature=0, response_format=Person
    ) as events:
        assert events.get_final_completion().choices[0].message.parsed == MIA


@cell(CHAT, "logprobs")
def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user(SUM), temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content
    assert "".join(token.token for token in answer.logprobs.content).startswith(SUM_ANSWER)
    assert all(token.logprob == max(t.logprob for t in token.top_logprobs) for token in answer.logprobs.content)
    completion = client.completions.create(model=MODEL, prompt="Once upon a", temperature=0, max_tokens=2, logprobs=2)
    assert completion.choices[0].logprobs is not None and len(completion.choices[0].logprobs.token_logprobs or []) == 2


@cell(RESPONSES, "text")
def test_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="My name is Tom.", temperature=0)
    assert first.status == "completed" and first.usage is not None and first.usage.output_tokens > 0
    second = client.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, temperature=0
    )
    assert "Tom" in second.output_text
    assert client.responses.retrieve(second.id).output_text == second.output_text


@cell(RESPONSES, "stream")
def test_response_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=SUM, temperature=0) as events:
        kinds, text = [], ""
        for event in events:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        assert text == events.get_final_response().output_text == SUM_ANSWER
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


@cell(RESPONSES, "tool loop")
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_response_tool_loop(client: openai.OpenAI, choice: Any) -> None:
    items: list[Any] = user(WEATHER_PROMPT)
    first = client.responses.create(model=MODEL, input=items, tools=[FLAT_TOOL], tool_choice=choice, temperature=0)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}
    items += [
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(WEATHER)},
    ]
    second = client.responses.create(model=MODEL, input=items, tools=[FLAT_TOOL], temperature=0)
    assert "sunny" in second.output_text


@cell(RESPONSES, "structured object")
def test_response_structured_object(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input=PERSON_PROMPT, text_format=Person, temperature=0)
    assert parsed.output_parsed == MIA


@cell(RESPONSES, "logprobs")
def test_response_logprobs(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input=SUM, temperature=0, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    [message] = [item for item in answer.output if item.type == "message"]
    [part] = message.content
    assert part.type == "output_text" and part.logprobs
    assert "".join(token.token for token in part.logprobs).startswith(SUM_ANSWER)
