"""Two workers under NVIDIA Dynamo's own frontend and router, on 127.0.0.1, without etcd and NATS."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.server import free_port

ROOT = Path(__file__).parents[3]
MODEL = "oneloop-demo"
BOUND_S = 120.0
SHARED = "You are a helpful assistant who tells long stories about animals. " * 12


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and answer, as JSON where it is some."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=BOUND_S) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def low_port() -> int:
    """A free one below 32768: Dynamo reads DYN_SYSTEM_PORT as 16 bits with a sign."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def wait_for(what: str, found: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + BOUND_S
    while True:
        with contextlib.suppress(OSError):
            if found():
                return
        assert all(process.poll() is None for process in processes), "a process has ended"
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    url: str
    workers: list[subprocess.Popen[bytes]]
    systems: list[str]

    def chat(self, text: str = "What is 2+2?", **more: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": text}]
        return ask(f"{self.url}/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0} | more)

    def metric(self, worker: int, name: str) -> float:
        """The sum of a metric over its labels."""
        _, text = ask(f"{self.systems[worker]}/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("dynamo")
    environment = os.environ | {
        "DYN_FILE_KV": str(directory / "kv"),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_EVENT_PLANE_HOST": "127.0.0.1",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    port, systems = free_port(), [low_port(), low_port()]
    worker = [sys.executable, "-m", "engine.integrations.dynamo", "--dtype", "float32", "--threads", "1"]
    frontend = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    frontend += ["--router-mode", "kv"]
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        processes = []
        for number, system in enumerate([*systems, None]):
            log = stack.enter_context((directory / f"{number}.log").open("wb"))
            own = environment if system is None else environment | {"DYN_SYSTEM_PORT": str(system)}
            command = frontend if system is None else worker
            process = subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        try:
            for number, system in enumerate(systems):
                health = f"http://127.0.0.1:{system}/health"
                wait_for(f"worker {number}", lambda health=health: ask(health)[0] == 200, processes)
            wait_for("the model", lambda: MODEL in str(ask(f"{url}/v1/models")), processes)
            yield Cluster(url, processes[:2], [f"http://127.0.0.1:{one}" for one in systems])
        except BaseException:
            for path in sorted(directory.glob("*.log")):
                print(f"--- {path.name}\n{path.read_text()[-4000:]}")
            raise


def test_answers(cluster: Cluster) -> None:
    status, answer = cluster.chat()
    [choice] = answer["choices"]
    assert (status, choice["message"]["content"], choice["finish_reason"]) == (200, "2 + 2 = 4", "stop")
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 5 and usage["completion_tokens"] > 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    status, cut = cluster.chat(max_tokens=3)
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 3)
    assert "2 + 2 = 4".startswith(cut["choices"][0]["message"]["content"])
    status, stopped = cluster.chat(stop=["="])
    assert stopped["choices"][0]["message"]["content"].rstrip() == "2 + 2"
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    status, told = ask(f"{cluster.url}/v1/completions", body)
    assert status == 200 and told["usage"]["completion_tokens"] == 8


def test_sampling(cluster: Cluster) -> None:
    drawn = [cluster.chat("Tell me a story.", temperature=1.0, seed=7, max_tokens=24)[1] for _ in range(2)]
    other = cluster.chat("Tell me a story.", temperature=1.0, seed=8, max_tokens=24)[1]
    texts = [answer["choices"][0]["message"]["content"] for answer in (*drawn, other)]
    assert texts[0] == texts[1] != texts[2]
    allowed = cluster.chat(allowed_token_ids=[20, 22], max_tokens=6)[1]
    assert set(allowed["choices"][0]["message"]["content"]) <= set("24")


def test_logprobs(cluster: Cluster) -> None:
    _, answer = cluster.chat(logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == "2 + 2 = 4"
    for one in content:
        assert one["logprob"] == max(top["logprob"] for top in one["top_logprobs"]) <= 0
        assert len(one["top_logprobs"]) == 3 and bytes(one["bytes"] or ()).decode() == one["token"]


def test_structures(cluster: Cluster) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    told = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = cluster.chat(response_format=told, max_tokens=200)
    assert status == 200 and json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 2, "temperature": 1}, "`n` must be 1"),
        ({"max_tokens": 100_000}, "context"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "schema",
        ),
    ],
    ids=["choices", "length", "ids", "schema"],
)
def test_what_is_wrong_is_told(cluster: Cluster, wrong: dict[str, Any], says: str) -> None:
    status, answer = cluster.chat(**wrong)
    assert status == 400 and says in answer["message"]
    assert cluster.chat()[0] == 200


def test_another_name_is_nobodys(cluster: Cluster) -> None:
    assert cluster.chat(model="nobody")[0] == 404


def test_the_router_learns_what_is_cached(cluster: Cluster) -> None:
    """By events, so also of what another router sent there."""
    text = [f"{SHARED} Say {number}." for number in range(4)]
    before = [cluster.metric(worker, "vllm:prompt_tokens_total") for worker in (0, 1)]
    cached = []
    for one in text:
        usage = cluster.chat(one, max_tokens=2)[1]["usage"]
        cached.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        time.sleep(0.3)
    after = [cluster.metric(worker, "vllm:prompt_tokens_total") for worker in (0, 1)]
    assert min(cached[1:]) > 100
    assert sorted(new > old for new, old in zip(after, before, strict=True)) == [False, True]


def test_a_client_that_leaves_frees_its_row(cluster: Cluster) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{cluster.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )

    def running() -> float:
        return sum(cluster.metric(worker, "vllm:num_requests_running") for worker in (0, 1))

    with urllib.request.urlopen(request, timeout=BOUND_S) as response:
        assert response.readline().startswith(b"data:")
        assert running() == 1
    wait_for("the end of the request", lambda: running() == 0, cluster.workers)


def test_the_end_is_in_order(cluster: Cluster) -> None:
    """The last test: one of the workers drains and is taken off the list, the other answers."""
    for worker in cluster.workers[:1]:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(BOUND_S) == 0
    assert [cluster.chat()[0] for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--disaggregation-mode", "prefill"], "--disaggregation-mode prefill: this worker"),
        (["--port", "8001"], "HTTP is the frontend's"),
        (["--enable-lora"], "--enable-lora"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--disable-kv-routing", "--kv-events-config", '{"enable_kv_cache_events": true}'], "contradict"),
    ],
    ids=["role", "http", "adapters", "model", "events"],
)
def test_flags_that_make_no_sense(flags: list[str], says: str) -> None:
    command = [sys.executable, "-m", "engine.integrations.dynamo", "--discovery-backend", "mem", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1
