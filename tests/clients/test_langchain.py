"""langchain-openai: `ChatOpenAI` on a base URL of its own, and `OpenAI` for completions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.common import MIA, MODEL, PERSON_PROMPT, SUM, SUM_ANSWER, WEATHER, WEATHER_PROMPT, Person, cell

CLIENT = "langchain-openai"


@tool
def get_weather(city: str) -> str:
    """Get the current weather"""
    assert city == "Paris"
    return json.dumps(WEATHER)


@pytest.fixture
def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0, max_retries=0)


@cell(CLIENT, "text")
def test_text(chat: ChatOpenAI, url: str) -> None:
    answer = chat.invoke(SUM)
    assert answer.text == SUM_ANSWER and answer.usage_metadata is not None
    completion = OpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=8, max_retries=0)
    assert completion.invoke("Once upon").startswith(" a time")


@cell(CLIENT, "stream")
def test_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(SUM))
    assert len(chunks) > 1 and "".join(chunk.text for chunk in chunks) == SUM_ANSWER


@cell(CLIENT, "tool loop")
@pytest.mark.parametrize("choice", [None, "required", "get_weather"])
def test_tool_loop(chat: ChatOpenAI, choice: Any) -> None:
    messages: list[Any] = [HumanMessage(WEATHER_PROMPT)]
    first = chat.bind_tools([get_weather], tool_choice=choice).invoke(messages)
    [call] = first.tool_calls
    said = get_weather.invoke(call)
    assert isinstance(said, ToolMessage)
    second = chat.bind_tools([get_weather]).invoke([*messages, first, said])
    assert "sunny" in second.text


@cell(CLIENT, "structured object")
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_object(chat: ChatOpenAI, method: Any) -> None:
    found = chat.with_structured_output(Person, method=method).invoke(PERSON_PROMPT)
    assert isinstance(found, Person)
    if method == "json_schema":
        assert found == MIA


@cell(CLIENT, "logprobs")
def test_logprobs(chat: ChatOpenAI) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(SUM)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in content).startswith(SUM_ANSWER)
