"""The `llm` command, as its users run it: a model of their own in extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.clients.common import MIA, MODEL, PERSON_PROMPT, SUM, SUM_ANSWER, WEATHER, WEATHER_PROMPT, Person, cell

CLIENT = "llm"
TOOLS = f'''
def get_weather(city: str) -> str:
    """Get the current weather"""
    return {json.dumps(json.dumps(WEATHER))}
'''


@pytest.fixture(scope="module")
def home(url: str) -> Path:
    home = Path(os.environ["LLM_USER_PATH"])
    home.mkdir(parents=True, exist_ok=True)
    chat = {
        "model_id": "demo",
        "model_name": MODEL,
        "api_base": f"{url}/v1",
        "supports_tools": True,
        "supports_schema": True,
    }
    (home / "extra-openai-models.yaml").write_text(
        yaml.safe_dump([chat, {**chat, "model_id": "base", "completion": True}])
    )
    return home


def say(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "llm", "-m", "demo", "-o", "temperature", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=home, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cell(CLIENT, "text")
def test_text(home: Path) -> None:
    assert say(home, "--no-stream", SUM) == SUM_ANSWER


@cell(CLIENT, "stream")
def test_stream(home: Path) -> None:
    assert say(home, SUM) == SUM_ANSWER


@cell(CLIENT, "tool loop")
def test_tool_loop(home: Path) -> None:
    assert "sunny" in say(home, "--functions", TOOLS, WEATHER_PROMPT)


@cell(CLIENT, "structured object")
def test_structured_object(home: Path) -> None:
    schema = json.dumps(Person.model_json_schema())
    assert Person.model_validate_json(say(home, "--schema", schema, PERSON_PROMPT)) == MIA


@cell(CLIENT, "logprobs")
def test_logprobs(home: Path) -> None:
    """Completions only, and only in the log."""
    command = [sys.executable, "-m", "llm", "-m", "base", "-o", "logprobs", "2", "-o", "max_tokens", "3", "Once upon"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=home, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    [entry] = json.loads(
        subprocess.run(
            [sys.executable, "-m", "llm", "logs", "-m", "base", "--json"], capture_output=True, timeout=60
        ).stdout
    )
    assert "logprobs" in json.dumps(entry)
