"""The router `smg` in front of two servers: requests with one prefix go where it is cached, and answers are whole.

The commands are those of server/deploy/compose.yaml, as plain processes on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.clients.common import MODEL, SUM, SUM_ANSWER, WEATHER_PROMPT, WEATHER_TOOL, user
from tests.clients.conftest import ROOT, START_BOUND_S, serving

COMPOSE = yaml.safe_load((ROOT / "server/deploy/compose.yaml").read_text())["services"]


def command_of(service: str) -> list[str]:
    """What compose would run, with the defaults of its variables."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in COMPOSE[service]["command"]]


def replaced(command: list[str], flag: str, *values: str) -> list[str]:
    """The values behind a flag, up to the next one, exchanged."""
    at = command.index(flag) + 1
    end = next((i for i, word in enumerate(command) if i >= at and word.startswith("--")), len(command))
    return [*command[:at], *values, *command[end:]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    names = [name for name in COMPOSE if name.startswith("replica")]
    with serving(*command_of(names[0])) as first, serving(*command_of(names[1])) as second:
        yield [first, second]


@contextlib.contextmanager
def routing(workers: list[str], log: Path) -> Iterator[str]:
    """A router on 127.0.0.1 alone, its figures too. Its address, once it knows both workers."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    own = replaced(replaced(command_of("router"), "--host", "127.0.0.1"), "--port", str(port))
    command = [
        *(sys.executable, "-m", "smg", *replaced(own, "--worker-urls", *workers)),
        *("--health-check-interval-secs", "5"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
    ]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            bound = time.monotonic() + START_BOUND_S
            while len(_healthy(url)) < len(workers):
                assert process.poll() is None and time.monotonic() < bound, log.read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(START_BOUND_S)


def _healthy(url: str) -> list[Any]:
    try:
        with urllib.request.urlopen(f"{url}/workers", timeout=5) as response:
            return [worker for worker in json.load(response)["workers"] if worker["is_healthy"]]
    except OSError:
        return []


def served(worker: str) -> int:
    """Chats that a worker has answered."""
    with urllib.request.urlopen(f"{worker}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    name = 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def test_two_workers_behind_a_router(workers: list[str], tmp_path: Path) -> None:
    with routing(workers, tmp_path / "smg.log") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        ask: dict[str, Any] = {"model": MODEL, "temperature": 0}
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(messages=user(SUM), **ask)
        assert answer.choices[0].message.content == SUM_ANSWER
        chunks = list(client.chat.completions.create(messages=user(SUM), stream=True, **ask))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SUM_ANSWER
        calls = client.chat.completions.create(messages=user(WEATHER_PROMPT), tools=[WEATHER_TOOL], **ask)
        assert calls.choices[0].finish_reason == "tool_calls"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(messages=user(SUM), model=MODEL, temperature=3)
        before = [served(worker) for worker in workers]
        cached = []
        for number in range(4):
            system = {"role": "system", "content": "You are a helpful assistant who tells long stories. " * 20}
            answer = client.chat.completions.create(messages=[system, *user(f"Say {number}.")], max_tokens=2, **ask)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        grown = [served(worker) - count for worker, count in zip(workers, before, strict=True)]
        # All of them where the first had been, which had kept what they share.
        assert sorted(grown) == [0, 4] and min(cached[1:]) > 100
