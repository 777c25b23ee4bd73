"""NixlConnector over an agent that is none: transfers that never end, and what they may write to. The real one:
tests/scale/transfer."""

from __future__ import annotations

import base64
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from engine.config import StartupError
from engine.executor.host_pages import HostPages
from engine.transfer import nixl
from engine.transfer.base import Json, TransferError
from engine.transfer.nixl import NixlConnector

# Ends what hangs.
BOUND_S = 60.0
PLACES = [np.array([1, 3], np.int32)]
STUCK, GOOD = b"a peer that has stopped", b"a peer"


class Agent:
    """Transfers from GOOD are done when they are asked after; from STUCK never, and no release ends them."""

    def __init__(self) -> None:
        self.regions: list[Any] | None = None
        self.peers: dict[str, bytes] = {}
        self.writing: list[Any] = []

    def register_memory(self, regions: list[Any], kind: str) -> object:
        assert kind == "DRAM" and self.regions is None
        self.regions = regions
        return regions

    def deregister_memory(self, regions: object) -> None:
        assert regions is self.regions
        self.regions = None

    def get_agent_metadata(self) -> bytes:
        return b"this one"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        name = f"peer {len(self.peers)}"
        self.peers[name] = metadata
        return name.encode()

    def remove_remote_agent(self, name: str) -> None:
        del self.peers[name]

    def get_xfer_descs(self, rows: Any, kind: str) -> Any:
        return rows

    def initialize_xfer(self, what: str, mine: Any, theirs: Any, name: str) -> dict[str, Any]:
        assert what == "READ" and self.regions is not None
        return {"peer": self.peers[name], "mine": mine}

    def transfer(self, handle: dict[str, Any]) -> str:
        self.writing.append(handle)
        return "PROC"

    def check_xfer_state(self, handle: dict[str, Any]) -> str:
        if handle["peer"] == STUCK:
            return "PROC"
        self.writing.remove(handle)
        return "DONE"

    def release_xfer_handle(self, handle: dict[str, Any]) -> None:
        """As NIXL over UCX does it: the request is forgotten and goes on."""


class Device:
    """A connector and every agent that it has had."""

    def __init__(self) -> None:
        self.agents: list[weakref.ref[Agent]] = []
        self.connector = NixlConnector(self.make)
        self.connector.register([HostPages([np.zeros((8, 4096), np.uint8)], "pages")])

    def make(self) -> Agent:
        agent = Agent()
        self.agents.append(weakref.ref(agent))
        return agent

    def describe(self, peer: bytes) -> Json:
        return self.connector.describe(PLACES) | {"agent": base64.b64encode(peer).decode()}

    def read(self, peer: bytes, timeout_s: float) -> Future[int]:
        return self.connector.read(self.describe(peer), PLACES, timeout_s)

    def expire(self, future: Future[int]) -> None:
        """Its transfer has begun, and now its time is over."""
        while not (found := [read for read in self.connector._running if read.future is future and read.handle]):
            assert not future.done()
            time.sleep(0.001)
        found[0].ends_at = 0.0

    def num_writing(self) -> int:
        """Transfers that may yet write to the memory: agents that are gone have none."""
        gc.collect()
        return sum(len(agent.writing) for one in self.agents if (agent := one()) is not None)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(nixl, "LATE_S", 0.1)
    monkeypatch.setattr(nixl, "END_S", 0.2)
    made = Device()
    yield made
    made.connector.close()
    assert not made.num_writing()


def reason_of(future: Future[int]) -> str:
    with pytest.raises(TransferError) as error:
        future.result(BOUND_S)
    return error.value.reason


def test_a_transfer_that_never_ends_is_given_up(device: Device) -> None:
    """Its pages are free when nobody can write to them any more; others come to their end, and there are more."""
    told: list[int] = []
    stuck = device.read(STUCK, 3600.0)
    stuck.add_done_callback(lambda _: told.append(device.num_writing()))
    patient = device.read(STUCK, 3600.0)
    device.expire(stuck)
    assert reason_of(stuck) == "timeout" and told == [0]
    assert len(device.agents) == 2 and not patient.done()
    # That one began again with the other agent, which knows the memory and is known.
    assert device.read(GOOD, 20.0).result(BOUND_S) == 2 * 4096
    assert device.describe(GOOD)["regions"] and device.num_writing() == 1


@pytest.mark.parametrize("end", [lambda one: one.release(None), lambda one: one.close()], ids=["release", "close"])
def test_what_never_ends_holds_nothing_up(device: Device, end: Callable[[NixlConnector], None]) -> None:
    stuck = device.read(STUCK, 3600.0)
    while not device.num_writing():
        pass
    end(device.connector)
    assert reason_of(stuck) == "resting" and not device.num_writing()


def test_after_a_rest_there_is_another_agent(device: Device) -> None:
    device.read(STUCK, 3600.0)
    device.connector.release(None)
    with pytest.raises(TransferError, match="away"):
        device.read(GOOD, 20.0)
    device.connector.register([HostPages([np.zeros((8, 4096), np.uint8)], "pages")])
    assert device.read(GOOD, 20.0).result(BOUND_S) == 2 * 4096


def test_without_another_agent_nothing_is_read(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Agent:
        raise OSError("no more agents")

    monkeypatch.setattr(device.connector, "_make_agent", fail)
    stuck, patient = device.read(STUCK, 3600.0), device.read(STUCK, 3600.0)
    device.expire(stuck)
    assert {reason_of(stuck), reason_of(patient)} == {"timeout"} and not device.num_writing()
    with pytest.raises(TransferError, match="away"):
        device.read(GOOD, 20.0)
    monkeypatch.undo()
    device.connector.release(None)
    device.connector.register([HostPages([np.zeros((8, 4096), np.uint8)], "pages")])
    assert device.read(GOOD, 20.0).result(BOUND_S) == 2 * 4096


def test_a_transfer_that_cannot_be_asked_after_leaves_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a handle nor a peer of its agent."""
    released: list[dict[str, Any]] = []

    def fail(self: Agent, handle: dict[str, Any]) -> str:
        self.writing.remove(handle)
        raise RuntimeError("no such request")

    monkeypatch.setattr(Agent, "check_xfer_state", fail)
    monkeypatch.setattr(Agent, "release_xfer_handle", lambda self, handle: released.append(handle))
    assert reason_of(device.read(GOOD, 20.0)) == "transfer"
    (agent,) = (one() for one in device.agents)
    assert len(released) == 1 and agent is not None and not agent.peers


def test_pages_stay_lent_while_a_transfer_cannot_be_released(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Agent, handle: dict[str, Any]) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr(Agent, "check_xfer_state", fail)
    monkeypatch.setattr(Agent, "release_xfer_handle", fail)
    told: list[int] = []
    read = device.read(GOOD, 3600.0)
    read.add_done_callback(lambda _: told.append(device.num_writing()))
    device.expire(read)
    assert reason_of(read) == "timeout" and told == [0] and len(device.agents) == 2


def test_after_its_end_nothing_is_waited_for(device: Device) -> None:
    device.connector.close()
    device.connector.release(None)
    device.connector.close()
    with pytest.raises(StartupError, match="shutting down"):
        device.connector.register([HostPages([np.zeros((8, 4096), np.uint8)], "pages")])
    with pytest.raises(TransferError):
        device.connector.read({"agent": base64.b64encode(GOOD).decode()}, PLACES, 1.0)
