"""The router smg before real servers: sessions that stay where they began, prefill and decode apart, and workers that
are taken away, killed and started again while streams go on. tests/clients/test_smg.py has its cache-aware policy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.server import free_port

ROOT = Path(__file__).parents[3]
MODEL = "oneloop-demo"
# Ends what hangs.
BOUND_S = 240.0
STORY = "Once upon a time there was a fox who lived in a wood near a river. " * 5
TRANSFER = json.dumps({"kv_connector": "TcpConnector", "kv_role": "kv_both", "kv_port": 0})


class Program:
    """A process that answers on a port of 127.0.0.1, and what it wrote."""

    def __init__(self, log: Path, port: int, *command: str) -> None:
        self.port, self.url, self._log = port, f"http://127.0.0.1:{port}", log
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, stdout=output, stderr=output, cwd=ROOT
            )

    def wait(self, path: str, ready: Callable[[Any], bool] = lambda _: True) -> None:
        until = time.monotonic() + BOUND_S
        while True:
            assert self.process.poll() is None and time.monotonic() < until, self._log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                if ready(self.get(path)):
                    return
            time.sleep(0.1)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=BOUND_S) as response:
            data = response.read().decode()
        return json.loads(data) if response.headers.get_content_type() == "application/json" else data

    def send(self, path: str, body: Any = None, method: str = "POST", **headers: str) -> Any:
        """What is answered: an object, or the events of a stream without the last one."""
        data = None if body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, told, method=method)
        with urllib.request.urlopen(request, timeout=BOUND_S) as response:
            text = response.read().decode()
        if response.headers.get_content_type() != "text/event-stream":
            return json.loads(text)
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def answered(self) -> float:
        """Requests that have ended in this server."""
        return self.metric("vllm:request_success_total")

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def serve(log: Path, port: int | None = None) -> Program:
    """One of our servers; not ready yet."""
    port = free_port() if port is None else port
    words = f"--port {port} --dtype float32 --threads 1 --kv-cache-gb 0.1 --no-web --log-level warning"
    return Program(log, port, "engine.serve", *words.split(), "--kv-transfer-config", TRANSFER)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Program]]:
    """Two, for all tests; who ends one puts another in its place."""
    where = tmp_path_factory.mktemp("servers")
    found = [serve(where / name) for name in "ab"]
    try:
        for server in found:
            server.wait("/ready")
        yield found
    finally:
        for server in found:
            server.end()


@contextlib.contextmanager
def routing(log: Path, *flags: str) -> Iterator[Program]:
    """A router that knows no worker yet."""
    port = free_port()
    words = f"launch --host 127.0.0.1 --port {port} --prometheus-host 127.0.0.1 --prometheus-port {free_port()}"
    words += " --health-check-interval-secs 1 --shutdown-grace-period-secs 5"
    router = Program(log, port, "smg", *words.split(), *flags)
    try:
        router.wait("/workers")
        yield router
    finally:
        router.end()


def workers(router: Program) -> dict[str, str]:
    """Those that get requests: ids by URL."""
    return {one["url"]: one["id"] for one in router.get("/workers")["workers"] if one["is_healthy"]}


def add(router: Program, *servers: Program, **words: Any) -> None:
    for server in servers:
        router.send("/workers", {"url": server.url, **words})
    router.wait("/workers", lambda _: all(server.url in workers(router) for server in servers))


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def test_sessions_stay_where_they_began(servers: list[Program], tmp_path: Path) -> None:
    with routing(tmp_path / "smg", "--policy", "round_robin", "--sticky-sessions") as router:
        add(router, *servers)
        places: dict[str, set[int]] = {}
        for turn in range(3):
            for session in ("one", "two", "three", "four"):
                before = [server.answered() for server in servers]
                body = chat(f"I am {session}. {STORY}" + "And then? " * turn, max_tokens=2)
                router.send("/v1/chat/completions", body, X_SMG_Routing_Key=session)
                [place] = [at for at, server in enumerate(servers) if server.answered() > before[at]]
                places.setdefault(session, set()).add(place)
        assert all(len(found) == 1 for found in places.values()), places
        # New ones go to each in turn.
        assert sorted(place for found in places.values() for place in found) == [0, 0, 1, 1]


# What is asked, and where the answer says what was generated.
FAMILIES: list[tuple[str, dict[str, Any], Callable[[Any], Any]]] = [
    ("/v1/chat/completions", chat("Chat. " + STORY, max_tokens=12), lambda answer: answer["choices"][0]["message"]),
    (
        "/v1/completions",
        {"model": MODEL, "prompt": "Completion. " + STORY, "max_tokens": 12, "temperature": 1, "seed": 4},
        lambda answer: answer["choices"][0]["text"],
    ),
    (
        "/generate",
        {"text": "Generate. " + STORY, "sampling_params": {"max_new_tokens": 12, "temperature": 0}},
        lambda answer: answer["text"],
    ),
    ("/v1/messages", chat("Messages. " + STORY, max_tokens=12), lambda answer: answer["content"]),
    (
        "/v1/responses",
        {"model": MODEL, "input": "Responses. " + STORY, "max_output_tokens": 12, "temperature": 0},
        lambda answer: [part["text"] for item in answer["output"] for part in item["content"]],
    ),
]


def test_prefill_and_decode_apart(servers: list[Program], tmp_path: Path) -> None:
    """smg is told of the connector when a worker is added; it has no flag for it."""
    prefill, decode = servers
    with routing(tmp_path / "smg", "--pd-disaggregation") as router:
        add(router, prefill, worker_type="prefill", kv_connector="NixlConnector")
        add(router, decode, worker_type="decode")
        for path, body, said in FAMILIES:
            hits = decode.metric("vllm:external_prefix_cache_hits_total")
            answer = router.send(path, body)
            # Pages of 16 tokens; the prompts have about a hundred.
            assert decode.metric("vllm:external_prefix_cache_hits_total") >= hits + 80, path
            assert said(answer) == said(prefill.send(path, body)), path
        hits = decode.metric("vllm:external_prefix_cache_hits_total")
        events = router.send("/v1/chat/completions", chat("Stream. " + STORY, max_tokens=12, stream=True))
        assert decode.metric("vllm:external_prefix_cache_hits_total") >= hits + 80
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        bodies = [chat(f"Number {number}. {STORY}", max_tokens=4) for number in range(8)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda body: router.send("/v1/chat/completions", body), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            own = prefill.send("/v1/chat/completions", body)
            assert answer["choices"][0]["message"] == own["choices"][0]["message"]
        assert not decode.metric("oneloop_kv_transfer_failures_total")
        assert not prefill.metric("oneloop_kv_transfer_kept_pages"), "the reader has said that it has them"


class Streams:
    """Long answers that go on while something happens to a worker."""

    def __init__(self, router: Program, count: int) -> None:
        body = {"model": MODEL, "prompt": "Tell me a story.", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        self._pool = ThreadPoolExecutor(count)
        self._running = [self._pool.submit(router.send, "/v1/completions", body) for _ in range(count)]

    def ends(self) -> list[str]:
        """Of each, why it ended; "error" where an event says that it could not go on."""
        with self._pool:
            ended = [stream.result() for stream in self._running]
        return [
            "error" if "error" in events[-1] else str(events[-1]["choices"][0]["finish_reason"]) for events in ended
        ]


def until_all_run(servers: list[Program], each: int) -> None:
    limit = time.monotonic() + BOUND_S
    while any(server.metric("vllm:num_requests_running") < each for server in servers):
        assert time.monotonic() < limit
        time.sleep(0.05)


def until_reached(router: Program, server: Program) -> None:
    """Until the router sends requests to this server."""
    before, limit = server.answered(), time.monotonic() + BOUND_S
    while server.answered() == before:
        assert time.monotonic() < limit
        router.send("/v1/chat/completions", chat("Hi", max_tokens=1))


def test_workers_go_and_come_while_streams_go_on(servers: list[Program], tmp_path: Path) -> None:
    stays, goes = servers
    with routing(tmp_path / "smg", "--policy", "round_robin") as router:
        add(router, stays, goes)
        # Taken from the router: what it has goes on to its end, and nothing new comes.
        streams = Streams(router, 4)
        until_all_run(servers, 2)
        router.send(f"/workers/{workers(router)[goes.url]}", method="DELETE")
        router.wait("/workers", lambda _: goes.url not in workers(router))
        before = goes.answered()
        for _ in range(4):
            router.send("/v1/chat/completions", chat("Hi", max_tokens=1))
        assert streams.ends() == ["length"] * 4
        assert goes.answered() == before + 2, "its two streams alone"

        # Told to end, it drains; another one on its address is taken in again.
        add(router, goes)
        streams = Streams(router, 4)
        until_all_run(servers, 2)
        goes.process.send_signal(signal.SIGTERM)
        for _ in range(4):
            router.send("/v1/chat/completions", chat("Hi", max_tokens=1))
        assert streams.ends() == ["length"] * 4
        assert goes.process.wait(BOUND_S) == 0
        servers[1] = goes = serve(tmp_path / "again", goes.port)
        goes.wait("/ready")
        until_reached(router, goes)

        # Killed: its streams end with an error, all else is answered by the other one.
        streams = Streams(router, 4)
        until_all_run(servers, 2)
        goes.end(signal.SIGKILL)
        for _ in range(4):
            router.send("/v1/chat/completions", chat("Hi", max_tokens=1))
        assert sorted(streams.ends()) == ["error"] * 2 + ["length"] * 2
        servers[1] = goes = serve(tmp_path / "third", goes.port)
        goes.wait("/ready")
        until_reached(router, goes)
