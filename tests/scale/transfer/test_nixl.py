"""Two servers of the demo model and real NIXL between them, driven as llm-d's sidecar drives vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.config import TransferOptions
from engine.executor.host_pages import HostPages
from engine.transfer import nixl as nixl_connector
from engine.transfer.base import TransferError
from engine.transfer.registry import make_connector

pytest.importorskip("nixl")

ROOT = Path(__file__).parents[3]
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
STORY = "Once upon a time there was a fox who lived in a wood near a river. "


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """A process; `log` is all that it wrote."""

    def __init__(self, path: Path, transport: str | None, *options: str, **config: Any) -> None:
        self.port, self._path = free_port(), path
        given = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_port": 0, **config}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if transport is not None:
            environment |= {"UCX_TLS": transport, "UCX_NET_DEVICES": "lo"}
        command = [sys.executable, "-m", "engine.serve", "--port", str(self.port), "--dtype", "float32"]
        command += ["--threads", "1", "--kv-cache-gb", "0.1", "--kv-transfer-config", json.dumps(given), *options]
        with path.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)

    @property
    def log(self) -> str:
        return self._path.read_text()

    def wait(self) -> None:
        for _ in range(1800):
            assert self.process.poll() is None, self.log
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


RANKED = "tcp of ranks", "any of ranks"
RANKS = "--tensor-parallel-size=2"


# Over TCP alone, and by whatever there is between two processes of a machine; each of two ranks, whose pages it reads.
@pytest.fixture(
    scope="module", params=[("tcp,self",), (None,), ("tcp,self", RANKS), (None, RANKS)], ids=["tcp", "any", *RANKED]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    where = tmp_path_factory.mktemp("servers")
    servers = [Server(where / name, *request.param, "--no-web") for name in "pd"]
    try:
        for server in servers:
            server.wait()
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.end()


def through(pair: tuple[Server, Server], path: str, body: dict[str, Any]) -> dict[str, Any]:
    """As llm-d's sidecar sends it."""
    first = {**body, "max_tokens": 1, "max_completion_tokens": 1, "stream": False, "kv_transfer_params": PREFILL}
    if path == "/v1/completions":
        del first["max_completion_tokens"]
    params = pair[0].post(path, first)["kv_transfer_params"]
    assert params["do_remote_prefill"] and params["remote_block_ids"]
    return pair[1].post(path, {**body, "kv_transfer_params": params})


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (1, {"temperature": 0, "logprobs": 3}),
        (2, {"temperature": 1, "seed": 5, "logprobs": 1}),
        (3, {"n": 2, "seed": 6}),
    ],
    ids=["greedy", "sampled", "choices"],
)
def test_completions_are_those_of_one_server(pair: tuple[Server, Server], number: int, fields: dict[str, Any]) -> None:
    body = {"prompt": f"Story {number}. " + STORY * 5, "max_tokens": 24, **fields}
    hits = pair[1].metric("vllm:external_prefix_cache_hits_total")
    answer, expected = through(pair, "/v1/completions", body), pair[0].post("/v1/completions", body)
    assert answer["choices"] == expected["choices"]
    assert pair[1].metric("vllm:external_prefix_cache_hits_total") >= hits + 64
    assert not pair[1].metric("vllm:nixl_num_failed_transfers_total")
    assert not pair[0].metric("oneloop_kv_transfer_kept_pages"), "the reader has said that it has them"


def test_a_chat_is_that_of_one_server(pair: tuple[Server, Server]) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox named Lena. " + STORY * 3}]
    body = {"messages": messages, "max_tokens": 32, "temperature": 0, "logprobs": True}
    answer, expected = through(pair, "/v1/chat/completions", body), pair[0].post("/v1/chat/completions", body)
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
    assert answer["choices"][0]["logprobs"] == expected["choices"][0]["logprobs"]


def test_many_at_once(pair: tuple[Server, Server]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bodies = [{"prompt": f"Number {n}. " + STORY * 4, "max_tokens": 8, "temperature": 0} for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: through(pair, "/v1/completions", body)["choices"][0]["text"], bodies))
        expected = list(pool.map(lambda body: pair[0].post("/v1/completions", body)["choices"][0]["text"], bodies))
    assert answers == expected and not pair[1].metric("oneloop_kv_transfer_failures_total")


def test_after_sleep_the_memory_is_another(pair: tuple[Server, Server]) -> None:
    for server in pair:
        for path in ("/sleep?level=1", "/wake_up"):
            url = f"http://127.0.0.1:{server.port}{path}"
            with urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), timeout=30) as response:
                assert response.status == 200
    hits = pair[1].metric("vllm:external_prefix_cache_hits_total")
    body = {"prompt": "Awake. " + STORY * 5, "max_tokens": 8, "temperature": 0}
    assert through(pair, "/v1/completions", body)["choices"] == pair[0].post("/v1/completions", body)["choices"]
    assert pair[1].metric("vllm:external_prefix_cache_hits_total") > hits


def test_a_prefiller_that_died_and_one_of_another_kind(pair: tuple[Server, Server], tmp_path: Path) -> None:
    """Both are told in a line, and the answer is right. The next prefiller is read from as the first."""
    decode, body = pair[1], {"max_tokens": 8, "temperature": 0}
    other = Server(tmp_path / "other", None, "--kv-cache-dtype", "int8")
    dead = Server(tmp_path / "dead", None)
    try:
        for server in (other, dead):
            server.wait()
        for server, prompt, reason in ((other, "Int8. ", "mismatch"), (dead, "Dead. ", "peer")):
            prompt += STORY * 5
            first = {"prompt": prompt, "kv_transfer_params": PREFILL, "max_tokens": 1}
            params = server.post("/v1/completions", first)["kv_transfer_params"]
            if server is dead:
                dead.process.kill()
                dead.process.wait()
            failed = decode.metric("oneloop_kv_transfer_failures_total")
            answer = decode.post("/v1/completions", {"prompt": prompt, **body, "kv_transfer_params": params})
            assert decode.metric("oneloop_kv_transfer_failures_total") == failed + 1
            assert f"were not had ({reason}" in decode.log
            expected = pair[0].post("/v1/completions", {"prompt": prompt, **body})
            assert answer["choices"] == expected["choices"]
    finally:
        other.end()
        dead.end()


def test_pages_and_states_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two memories, each with places of its own; and what the peer says of them is looked at."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")

    def memories(fill: int) -> tuple[list[HostPages], list[npt.NDArray[np.uint8]]]:
        parts = [np.full((50, 4096), fill, np.uint8), np.full((50, 512), fill, np.uint8)]
        states = [np.full((4, 70_000), fill, np.uint8)]
        for part in (*parts, *states):
            part[:, 0] = np.arange(len(part))
        return [HostPages(parts, "pages"), HostPages(states, "states")], [*parts, *states]

    theirs, own = (make_connector(TransferOptions("NixlConnector")) for _ in range(2))
    try:
        sources, _ = memories(7)
        into, arrays = memories(0)
        theirs.register(sources)
        own.register(into)
        described = theirs.describe([np.array([9, 3, 40], np.int32), np.array([2], np.int32)])
        places = [np.array([1, 2, 30], np.int32), np.array([3], np.int32)]
        assert own.read(json.loads(json.dumps(described)), places, 20.0).result(30) == 3 * 4608 + 70_000
        for array, at, of in zip(arrays, ([1, 2, 30], [1, 2, 30], [3]), ([9, 3, 40], [9, 3, 40], [2]), strict=True):
            assert array[at, 0].tolist() == of and (array[at, 1:] == 7).all()
            assert not array[[i for i in range(len(array)) if i not in at], 1:].any()
        for change in (
            {"places": described["places"][:1]},
            {"places": [[9, 3], [2]]},
            {"places": [[9, 3, 40], [4]]},
            {"places": [[9, 3, 0], [2]]},
            {"places": None},
            {"regions": described["regions"][:1]},
            {"regions": described["regions"][::-1]},
            {"regions": [described["regions"][0], [[1, 2]]]},
            {"regions": [None, described["regions"][1]]},
        ):
            with pytest.raises(TransferError) as error:
                own.read(described | change, places, 20.0)
            assert error.value.reason == "mismatch", change
    finally:
        theirs.close()
        own.close()


PEER = """
import json, sys
import numpy as np
from engine.config import TransferOptions
from engine.executor.host_pages import HostPages
from engine.transfer.registry import make_connector

memory = np.full((200, 1 << 20), 7, np.uint8)
connector = make_connector(TransferOptions("NixlConnector"))
connector.register([HostPages([memory], "pages")])
print(json.dumps(connector.describe([np.arange(1, 150, dtype=np.int32)])), flush=True)
sys.stdin.read()
connector.close()
"""


@contextlib.contextmanager
def peer_of() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process with pages, and what it says of them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as peer:
        assert peer.stdout is not None
        try:
            # The library tells of itself on the same pipe.
            yield peer, next(json.loads(line) for line in peer.stdout if line.startswith("{"))
        finally:
            peer.kill()


@pytest.mark.parametrize("how", ["its time is over", "release"])
def test_a_peer_that_stops_amid_a_transfer(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The pages are given back, and whatever the peer does then, they are not written to. Others are read from."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setattr(nixl_connector, "LATE_S", 0.5)
    monkeypatch.setattr(nixl_connector, "END_S", 0.5)
    pages, places = np.zeros((200, 1 << 20), np.uint8), [np.arange(20, 169, dtype=np.int32)]
    own = make_connector(TransferOptions("NixlConnector"))
    own.register([HostPages([pages], "pages")])
    try:
        with peer_of() as (peer, described):
            future = own.read(described, places, 1.0 if how != "release" else 600.0)
            while not pages[20:].any():
                pass
            peer.send_signal(signal.SIGSTOP)
            if how == "release":
                own.release(None)
            with pytest.raises(TransferError) as error:
                future.result(60)
            assert error.value.reason == ("resting" if how == "release" else "timeout")
            pages[:] = 3
            peer.send_signal(signal.SIGCONT)
            time.sleep(1.0)
            assert (pages == 3).all(), "they were written to"
        if how == "release":
            own.register([HostPages([pages], "pages")])
        with peer_of() as (_, described):
            assert own.read(described, places, 60.0).result(90) == 149 << 20
        assert (pages[20:169] == 7).all() and (pages[:20] == 3).all()
    finally:
        own.close()
