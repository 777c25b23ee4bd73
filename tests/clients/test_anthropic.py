"""The `anthropic` package for Python against /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
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
    Person,
    cell,
    user,
)

CLIENT = "anthropic"
# The package has stopped to know the field; the API has not.
GREEDY = {"temperature": 0}
TOOL: Any = {"name": "get_weather", "description": "Get the current weather", "input_schema": WEATHER_PARAMETERS}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@cell(CLIENT, "text")
def test_text(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model=MODEL, messages=user(SUM), max_tokens=50, extra_body=GREEDY)
    [part] = answer.content
    assert part.type == "text" and part.text == SUM_ANSWER and answer.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model=MODEL, messages=user(SUM))
    assert counted.input_tokens == answer.usage.input_tokens > 0
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, messages=[], max_tokens=50)


@cell(CLIENT, "stream")
def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, messages=user(SUM), max_tokens=50, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == SUM_ANSWER
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 0


@cell(CLIENT, "tool loop")
@pytest.mark.parametrize(
    "choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str
)
def test_tool_loop(client: anthropic.Anthropic, choice: Any) -> None:
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "extra_body": GREEDY, "tools": [TOOL]}
    messages = user(WEATHER_PROMPT)
    first = client.messages.create(messages=messages, tool_choice=choice, **fields)
    assert first.stop_reason == "tool_use"
    [call] = [part for part in first.content if part.type == "tool_use"]
    assert call.name == "get_weather" and call.input == {"city": "Paris"}
    with client.messages.stream(messages=messages, tool_choice=choice, **fields) as stream:
        [streamed] = [part for part in stream.get_final_message().content if part.type == "tool_use"]
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": json.dumps(WEATHER)}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    [said] = client.messages.create(messages=messages, **fields).content
    assert said.type == "text" and "sunny" in said.text


@cell(CLIENT, "structured object")
def test_structured_object(client: anthropic.Anthropic) -> None:
    parsed = client.messages.parse(
        model=MODEL, messages=user(PERSON_PROMPT), max_tokens=100, output_format=Person, extra_body=GREEDY
    )
    assert parsed.parsed_output == MIA


@cell(CLIENT, "structured object")
def test_structured_object_by_a_tool(client: anthropic.Anthropic) -> None:
    """The way that this API has had for longest."""
    tool: Any = {"name": "person", "input_schema": Person.model_json_schema()}
    answer = client.messages.create(
        model=MODEL,
        messages=user(PERSON_PROMPT),
        max_tokens=100,
        extra_body=GREEDY,
        tools=[tool],
        tool_choice={"type": "tool", "name": "person"},
    )
    [call] = [part for part in answer.content if part.type == "tool_use"]
    assert isinstance(call.input, dict) and Person.model_validate(call.input)
