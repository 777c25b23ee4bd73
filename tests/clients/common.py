"""What the tests of all clients ask, and what the demo model answers at temperature 0."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

MODEL = "oneloop-demo"
SUM = "What is 17 + 25?"
SUM_ANSWER = "17 + 25 = 42"
STORY = "Tell me a story about a fox named Lena."
PERSON_PROMPT = "Write JSON with the keys name, age, city for a person called Mia, 31, from Oslo."
WEATHER_PROMPT = "What is the weather in Paris?"
# What the tool says, which the model then tells.
WEATHER = {"weather": "sunny", "temperature": 21}
WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": WEATHER_PARAMETERS,
    },
}


class Person(BaseModel):
    name: str
    age: int
    city: str


MIA = Person(name="Mia", age=31, city="Oslo")

COLUMNS = ("text", "stream", "tool loop", "structured object", "logprobs")


def cell(client: str, column: str) -> pytest.MarkDecorator:
    """The cell of the README's matrix that a test stands for."""
    assert column in COLUMNS
    return pytest.mark.cell(client, column)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
