"""pydantic-ai: agents with tools and with typed answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.common import MIA, MODEL, PERSON_PROMPT, SUM, SUM_ANSWER, WEATHER, WEATHER_PROMPT, Person, cell

CLIENT = "pydantic-ai"
Make = Callable[..., Agent[None, Any]]


@pytest.fixture
def make(url: str) -> Make:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    # It takes a name that it does not know for a model that reasons, and would leave out the temperature.
    model = OpenAIChatModel(MODEL, provider=provider, profile=OpenAIModelProfile(openai_supports_reasoning=False))
    return lambda **options: Agent(model, model_settings={"temperature": 0}, **options)


@cell(CLIENT, "text")
def test_text(make: Make) -> None:
    result = make().run_sync(SUM)
    assert result.output == SUM_ANSWER and result.usage.output_tokens > 0


@cell(CLIENT, "stream")
def test_stream(make: Make) -> None:
    assert "".join(make().run_stream_sync(SUM).stream_text(delta=True)) == SUM_ANSWER


@cell(CLIENT, "tool loop")
def test_tool_loop(make: Make) -> None:
    agent, cities = make(), []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Get the current weather"""
        cities.append(city)
        return json.dumps(WEATHER)

    assert "sunny" in agent.run_sync(WEATHER_PROMPT).output and cities == ["Paris"]


@cell(CLIENT, "structured object")
@pytest.mark.parametrize("how", [NativeOutput, ToolOutput])
def test_structured_object(make: Make, how: Any) -> None:
    """By a JSON schema, and by a tool that has to be called."""
    result = make(output_type=how(Person)).run_sync(PERSON_PROMPT)
    assert isinstance(result.output, Person)
    if how is NativeOutput:
        assert result.output == MIA


@cell(CLIENT, "logprobs")
def test_logprobs(make: Make) -> None:
    result = make().run_sync(SUM, model_settings={"temperature": 0, "openai_logprobs": True, "openai_top_logprobs": 2})
    details = result.all_messages()[-1].provider_details
    assert "".join(token["token"] for token in details["logprobs"]).startswith(SUM_ANSWER)
