"""The `ollama` package for Python against /api/*."""

from __future__ import annotations

import json
from collections.abc import Callable

import ollama
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

CLIENT = "ollama"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(url: str) -> ollama.Client:
    return ollama.Client(host=url, trust_env=False)


@cell(CLIENT, "text")
def test_text(client: ollama.Client) -> None:
    answer = client.chat(MODEL, user(SUM), options=GREEDY)
    assert answer.message.content == SUM_ANSWER and answer.done and answer.eval_count
    said = client.generate(MODEL, SUM, options=GREEDY)
    assert said.response == SUM_ANSWER
    assert [model.model for model in client.list().models] == [MODEL]
    assert client.show(MODEL).capabilities
    with pytest.raises(ollama.ResponseError) as lost:
        client.chat("gpt-9", user(SUM))
    assert lost.value.status_code == 404


@cell(CLIENT, "stream")
@pytest.mark.parametrize(
    "texts",
    [
        lambda client: [part.message.content for part in client.chat(MODEL, user(SUM), options=GREEDY, stream=True)],
        lambda client: [part.response for part in client.generate(MODEL, SUM, options=GREEDY, stream=True)],
    ],
    ids=["chat", "generate"],
)
def test_stream(client: ollama.Client, texts: Callable[[ollama.Client], list[str]]) -> None:
    pieces = texts(client)
    assert len(pieces) > 1 and "".join(pieces) == SUM_ANSWER


@cell(CLIENT, "tool loop")
def test_tool_loop(client: ollama.Client) -> None:
    messages = user(WEATHER_PROMPT)
    first = client.chat(MODEL, messages, tools=[WEATHER_TOOL], options=GREEDY).message
    assert first.tool_calls
    [call] = first.tool_calls
    assert call.function.name == "get_weather" and call.function.arguments == {"city": "Paris"}
    messages += [first, {"role": "tool", "tool_name": "get_weather", "content": json.dumps(WEATHER)}]
    second = client.chat(MODEL, messages, tools=[WEATHER_TOOL], options=GREEDY).message
    assert "sunny" in (second.content or "")


@cell(CLIENT, "structured object")
def test_structured_object(client: ollama.Client) -> None:
    answer = client.chat(MODEL, user(PERSON_PROMPT), format=Person.model_json_schema(), options=GREEDY)
    assert Person.model_validate_json(answer.message.content or "") == MIA


@cell(CLIENT, "logprobs")
def test_logprobs(client: ollama.Client) -> None:
    answer = client.chat(MODEL, user(SUM), options=GREEDY, logprobs=True, top_logprobs=2)
    assert answer.logprobs
    assert "".join(token.token for token in answer.logprobs).startswith(SUM_ANSWER)
