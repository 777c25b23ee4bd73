"""instructor: objects by a forced tool and by a JSON schema."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest

from tests.clients.common import MIA, MODEL, PERSON_PROMPT, Person, cell, user

CLIENT = "instructor"


def client(url: str, mode: Any) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)


@cell(CLIENT, "structured object")
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON"])
def test_structured_object(url: str, mode: str) -> None:
    found = client(url, instructor.Mode[mode]).chat.completions.create(
        model=MODEL, messages=user(PERSON_PROMPT), temperature=0, response_model=Person, max_retries=0
    )
    assert Person.model_validate(found.model_dump())
    if mode == "JSON_SCHEMA":
        assert found.model_dump() == MIA.model_dump()


@cell(CLIENT, "stream")
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_stream(url: str, mode: str) -> None:
    parts = list(
        client(url, instructor.Mode[mode]).chat.completions.create_partial(
            model=MODEL, messages=user(PERSON_PROMPT), temperature=0, response_model=Person, max_retries=0
        )
    )
    assert len(parts) > 1 and isinstance(parts[-1].age, int) and parts[-1].name
