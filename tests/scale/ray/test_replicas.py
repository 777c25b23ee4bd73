"""Real Ray on this machine: replicas come, die and go under load; no client loses what the dead one did not have."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import load_file, save

from bench.server import free_port

ROOT = Path(__file__).parents[3]
# Ends what hangs.
BOUND_S = 240.0
ROWS = 4
SHORT = {"model": "oneloop-demo", "prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
LONG = SHORT | {"prompt": "Tell me a story.", "max_tokens": 1200, "stream": True}


def processes() -> dict[int, tuple[int, str]]:
    """Of this machine: parent and command line by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = parent, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def replicas(root: int) -> list[int]:
    """Process ids of the model's replicas among the descendants of a process."""
    every = processes()
    ours = {root}
    while more := {pid for pid, (parent, _) in every.items() if parent in ours} - ours:
        ours |= more
    return sorted(pid for pid in ours if pid in every and "ServeReplica:oneloop:model-0" in every[pid][1])


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, int]]:
    """URL and process id of `python -m engine.serve_ray --replicas 1..3`."""
    port = free_port()
    words = (
        f"--replicas 1..3 --cpus-per-replica 0.1 --upscale-delay 1 --downscale-delay 4 --port {port} "
        f"--max-num-seqs {ROWS} --dtype float32 --threads 1 --drain-timeout 60"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = Path(f"/tmp/oneloop-ray-{os.getpid()}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.serve_ray", *words.split()], env=env, stdout=output, stderr=output
        )
    try:
        until = time.monotonic() + BOUND_S
        while b"oneloop is ready" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(120) == 0, log.read_text()[-4000:]
        finally:
            process.kill()
            log.unlink()


class Clients:
    """Clients of one server. replicas: who has answered. seen: texts of the short request, which are all the same."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self.http = url, http
        self.replicas: set[str] = set()
        self.seen: set[str] = set()
        self.problems: list[Any] = []
        self.stop = asyncio.Event()

    async def ask(self) -> None:
        async with self.http.post(f"{self.url}/v1/completions", json=SHORT) as response:
            body = await response.json()
            if response.status != 200:
                self.problems.append((response.status, body))
                return
            self.seen.add(body["choices"][0]["text"])
            self.replicas.add(response.headers["X-Oneloop-Replica"])

    async def load(self) -> None:
        while not self.stop.is_set():
            await self.ask()

    async def stream(self, began: asyncio.Event) -> tuple[str, list[Any]]:
        """Who answered, and all events."""
        async with self.http.post(f"{self.url}/v1/completions", json=LONG) as response:
            assert response.status == 200, await response.text()
            raw = b""
            async for piece in response.content.iter_any():
                raw += piece
                began.set()
        assert raw.endswith(b"\n\n")
        data = [event.removeprefix("data: ") for event in raw.decode().split("\n\n")[:-1]]
        events = [event if event == "[DONE]" else json.loads(event) for event in data if not event.startswith(":")]
        return response.headers["X-Oneloop-Replica"], events

    async def idle(self) -> None:
        """Wait until no replica has anything to do: this route is answered by the worst of them all."""
        async with asyncio.timeout(BOUND_S):
            while True:
                async with self.http.post(f"{self.url}/flush_cache") as response:
                    assert "X-Oneloop-Replicas" in response.headers
                    if response.status == 200:
                        return
                await asyncio.sleep(0.2)


async def until(condition: Any) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.1)


async def test_replicas_come_die_and_go(served: tuple[str, int]) -> None:
    url, root = served
    timeout = aiohttp.ClientTimeout(total=BOUND_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        clients = Clients(url, http)
        await clients.ask()
        assert len(clients.seen) == 1 and len(replicas(root)) == 1, clients.problems

        # More waits than one replica has rows: there will be three, and all of them answer.
        load = [asyncio.create_task(clients.load()) for _ in range(5 * ROWS)]
        await until(lambda: len(clients.replicas) == 3)
        clients.stop.set()
        await asyncio.gather(*load)
        assert not clients.problems

        # One dies: its streams say so, in the words of the API, and all others end as they should.
        clients.stop.clear()
        began = [asyncio.Event() for _ in range(2 * ROWS)]
        streams = [asyncio.create_task(clients.stream(event)) for event in began]
        await asyncio.gather(*(event.wait() for event in began))
        load = [asyncio.create_task(clients.load()) for _ in range(ROWS)]
        victim = replicas(root)[0]
        os.kill(victim, signal.SIGKILL)
        ended = await asyncio.gather(*streams)
        broken = {who for who, events in ended if "error" in events[-2]}
        assert len(broken) == 1, [(who, events[-2]) for who, events in ended]
        for who, events in ended:
            assert events[-1] == "[DONE]"
            if who in broken:
                assert events[-2]["error"]["code"] == "service_unavailable"
            else:
                assert events[-2]["choices"][0]["finish_reason"] == "length", events[-2]
        # Whole answers of which nothing had come were given by another replica, so none was lost.
        clients.replicas.clear()
        await asyncio.gather(*(clients.ask() for _ in range(2 * ROWS)))
        assert clients.replicas and not clients.replicas & broken
        clients.stop.set()
        await asyncio.gather(*load)
        assert not clients.problems and len(clients.seen) == 1

        # Clients that leave free their rows.
        for _ in range(3):
            event = asyncio.Event()
            leaving = [asyncio.create_task(clients.stream(event)) for _ in range(ROWS)]
            await event.wait()
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
        await clients.idle()

        # And back to one, while two streams after another go on to their ends.
        async with asyncio.timeout(BOUND_S):
            while len(replicas(root)) > 1:
                for _, events in await asyncio.gather(*(clients.stream(asyncio.Event()) for _ in range(2))):
                    assert events[-2]["choices"][0]["finish_reason"] == "length", events[-2]
        await clients.ask()
        assert not clients.problems and len(clients.seen) == 1


async def test_replicas_that_come_after_an_update_have_it(served: tuple[str, int]) -> None:
    url, root = served
    name = "model.norm.weight"
    norm = load_file(ROOT / "engine" / "demo" / "model.safetensors")[name].float()
    noise = torch.randn(norm.shape, generator=torch.Generator().manual_seed(1))
    timeout = aiohttp.ClientTimeout(total=BOUND_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        clients = Clients(url, http)
        await until(lambda: len(replicas(root)) == 1)
        await clients.ask()
        [before] = clients.seen
        path = f"{url}/update_weights_from_tensor?weight_version=one"
        headers = {"Content-Type": "application/octet-stream"}
        async with http.post(path, data=save({name: norm + 0.5 * noise}), headers=headers) as response:
            assert response.status == 200, await response.text()
        clients = Clients(url, http)
        load = [asyncio.create_task(clients.load()) for _ in range(5 * ROWS)]
        await until(lambda: len(clients.replicas) == 3 or clients.problems)
        clients.stop.set()
        await asyncio.gather(*load)
        assert not clients.problems and len(clients.seen) == 1 and before not in clients.seen


async def test_errors_are_the_servers_own(served: tuple[str, int]) -> None:
    url, _ = served
    async with aiohttp.ClientSession() as http:
        for path, body, status, where in (
            ("/v1/chat/completions", {"messages": 7}, 400, ("error", "param")),
            ("/v1/messages", {"model": "oneloop-demo"}, 400, ("error", "type")),
            ("/v1/nowhere", {}, 404, ("error", "type")),
        ):
            async with http.post(url + path, json=body, headers={"X-Request-Id": "mine"}) as response:
                told = await response.json()
                assert response.status == status and where[1] in told[where[0]], told
                assert response.headers.getall("X-Request-Id") == ["mine"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_the_deploy_file_is_one_for_serve() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from engine.serve_ray import application

    described = yaml.safe_load((ROOT / "server" / "deploy" / "ray" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(described)
    assert application(described["applications"][0]["args"])._bound_deployment.name == "front"
