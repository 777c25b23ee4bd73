"""A new server takes the listening socket of the old one: no connection is refused, no answer is cut."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from pathlib import Path

import aiohttp
import pytest

from engine.config import StartupError
from engine.engine import Engine
from server import serving
from server.handover import Offer, path_of, take
from server.state import State
from tests.server.support import BOUND_S, live, until

BODY = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}


async def test_requests_go_on_through_hand_overs(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/s"
    outcomes: list[int] = []
    over = asyncio.Event()

    async def client(url: str) -> None:
        while not over.is_set():
            # A connection each, as of many clients; and one that stays.
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND_S)) as session:
                for _ in range(2):
                    async with session.post(url + "/v1/completions", json=BODY) as response:
                        outcomes.append(response.status)
                        assert len((await response.json())["choices"][0]["text"]) >= 0

    async with live(handover=where, step_seconds=0.001) as first:
        clients = [asyncio.create_task(client(first.url)) for _ in range(3)]
        await until(lambda: len(outcomes) > 3)
        async with live(handover=where, step_seconds=0.001) as second:
            assert second.port == first.port
            await asyncio.wait_for(asyncio.shield(first.serving), BOUND_S)
            count = len(outcomes)
            await until(lambda: len(outcomes) > count + 6)
            async with live(handover=where, step_seconds=0.001) as third:
                await asyncio.wait_for(asyncio.shield(second.serving), BOUND_S)
                count = len(outcomes)
                await until(lambda: len(outcomes) > count + 6)
                assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
                over.set()
                await asyncio.gather(*clients)
                assert third.engine.metrics.generation_tokens > 0
    assert set(outcomes) == {200}
    assert not (tmp_path / "s").exists()


async def test_the_quiet_time_of_a_hand_over_is_part_of_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a first signal ends nothing: whoever stops the old process by it wants what every drain is."""
    limits: list[float] = []
    drain = serving.drain

    async def spied(engine: Engine, state: State, limit: float) -> None:
        limits.append(limit)
        os.kill(os.getpid(), signal.SIGTERM)
        await drain(engine, state, limit)

    monkeypatch.setattr(serving, "drain", spied)
    path = tmp_path / "s"
    async with live(handover=f"unix:{path}", drain_timeout_s=10.0) as server:
        server.device.gate.clear()
        asking = asyncio.create_task(server.post("/v1/completions", BODY))
        await until(lambda: server.num_requests() == 1)
        taken = await asyncio.to_thread(take, str(path))
        assert taken is not None
        taken.serving()
        taken.listening.close()
        monkeypatch.setattr(serving, "QUIET_S", 0.1)
        await asyncio.sleep(0.2)  # of the drain's time, which starts at the hand-over
        server.device.gate.set()
        status, answer = await asking
        assert status == 200 and answer["usage"]["completion_tokens"] == 5
        async with asyncio.timeout(BOUND_S):
            await server.serving
    [limit] = limits
    assert limit <= 10.0 - 0.1


def test_who_asks_and_leaves_changes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert take(path) is None
    listening = socket.create_server(("127.0.0.1", 0))
    taken: list[int] = []
    offer = Offer(path, listening, lambda: taken.append(1))
    for _ in range(2):
        other = take(path)
        assert other is not None and other.listening.getsockname() == listening.getsockname()
        other.listening.close()
        other._control.close()
    other = take(path)
    assert other is not None and not taken
    other.serving()
    offer._thread.join(BOUND_S)
    assert taken == [1]
    other.listening.close()
    offer.close()
    listening.close()
    # What a killed process left behind is in nobody's way.
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()
    assert take(path) is None


def test_what_is_no_place_for_it(tmp_path: Path) -> None:
    for given in ("/tmp/x", "unix:x", "tcp:/x", "unix:/" + "x" * 200, "unix:"):
        with pytest.raises(StartupError, match="--handover"):
            path_of(given)
    (tmp_path / "file").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with pytest.raises(StartupError, match="no socket"):
            Offer(str(tmp_path / "file"), listening, lambda: None)
        with pytest.raises(StartupError, match="--handover"):
            Offer(str(tmp_path / "none" / "s"), listening, lambda: None)
    assert (tmp_path / "file").read_text() == "mine"
