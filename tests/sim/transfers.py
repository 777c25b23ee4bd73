"""Prefill and decode apart in a simulation: the real exchange, which is both servers at once.

A prompt leaves its pages to a request in another namespace, so that nothing of it is in the cache there. What is in
between is the simulator's lot: words of the side channel take turns of a loop whose time is the simulator's clock, and
pages are copied one by one between the phases of a tick, also where they are nobody's any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Sequence as List
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.clock import Clock
from engine.config import TransferOptions
from engine.executor.base import PageMemory
from engine.forward import Int32Array
from engine.request import RemotePages, Request, Transfer
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.transfer.base import Json, TransferError
from engine.transfer.exchange import PageExchange
from engine.transfer.tally import TransferTally

if TYPE_CHECKING:
    from tests.sim.simulator import Simulator
    from tests.sim.workload import Arrival

Name = tuple[str, int | None]


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Turns when it is told to, and its time is the simulator's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._errors: list[BaseException] = []
        super().__init__()
        self.set_exception_handler(lambda loop, context: self._note(context.get("exception")))
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        task.add_done_callback(lambda done: None if done.cancelled() else self._note(done.exception()))
        return task

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            self._errors.append(error)

    def time(self) -> float:
        return self._clock.now()

    def turn(self) -> None:
        """Once through all that is ready, if there is anything: most turns have nothing to do."""
        if self._ready or (self._scheduled and self._scheduled[0].when() <= self.time()):
            self.call_soon(self.stop)
            self.run_forever()
        if self._errors:
            raise self._errors[0]


class SimulatedChannel:
    """Between the exchange and itself."""

    def __init__(self, exchange: SimulatedExchange, random: Random) -> None:
        self._exchange, self._random, self._opened = exchange, random, dict[str, str]()

    async def ask(self, message: Json) -> Json:
        """See Channel."""
        for _ in range(self._random.choice([0, 1, 4])):
            await asyncio.sleep(0)
        if self._random.random() < 0.02:
            raise TransferError("peer", "it hung up")
        answer: Json = json.loads(json.dumps(await self._exchange._answer(message, self._opened)))
        await asyncio.sleep(0)
        return answer

    def close(self) -> None:
        self._exchange._hang_up(self._opened)


class SimulatedExchange(PageExchange):
    """Asks itself."""

    random: Random

    async def _connect(self, host: str, port: int) -> Any:
        return SimulatedChannel(self, self.random)


@dataclasses.dataclass
class Copying:
    """left: (memory, from, to)."""

    left: list[tuple[int, int, int]]
    num_bytes: int
    future: Future[int]
    key: str


class SimulatedConnector:
    """Copies a page, or a state, when it is told to; whether or not what was described is still there."""

    def __init__(self, transfer: SimulatedTransfer) -> None:
        self._transfer = transfer
        self._memories: List[PageMemory] = ()
        self._described: dict[str, list[Int32Array]] = {}
        self._released: set[str] = set()
        self.copying: list[Copying] = []

    def register(self, memories: List[PageMemory]) -> None:
        """See Connector."""
        self._memories = memories

    def describe(self, places: List[Int32Array]) -> Json:
        """See Connector."""
        key = str(len(self._described))
        self._described[key] = [one.copy() for one in places]
        return {"key": key}

    def read(self, remote: Json, places: List[Int32Array], timeout_s: float) -> Future[int]:
        """See Connector."""
        assert timeout_s >= 0.0
        left, num_bytes = [], 0
        described = self._described[remote["key"]]
        for kind, (memory, source, into) in enumerate(zip(self._memories, described, places, strict=True)):
            left += [(kind, one, other) for one, other in zip(source.tolist(), into.tolist(), strict=True)]
            num_bytes += memory.page_bytes * len(into)
        future: Future[int] = Future()
        self.copying.append(Copying(left, num_bytes, future, remote["key"]))
        return future

    def release(self, description: Json | None) -> None:
        """See Connector."""
        assert description is not None
        self._released.add(description["key"])

    def close(self) -> None:
        """See Connector."""

    def turn(self) -> None:
        """One page of some copy."""
        one = self._transfer.random.choice(self.copying)
        if one.left:
            kind, source, into = one.left.pop(0)
            memory = self._memories[kind]
            row = np.zeros((1, memory.page_bytes), np.uint8)
            memory.copy_out(np.array([source], np.int32), row)
            if kind == 0:
                self._transfer.carried(source, into, is_described=one.key not in self._released)
            memory.copy_in(np.array([into], np.int32), row)
        if not one.left:
            self.copying.remove(one)
            one.future.set_result(one.num_bytes)


class SimulatedTransfer:
    """See the module."""

    def __init__(self, simulator: Simulator, seed: int) -> None:
        options = simulator.options
        self._simulator, self.random = simulator, Random(f"transfer {seed}")
        self._eagerness = options.transfer_eagerness
        self._loop = SimulatedLoop(simulator.clock)
        self._connector = SimulatedConnector(self)
        timeout = options.transfer_timeout_s
        self.exchange = SimulatedExchange(
            # As a consumer it listens to nobody.
            TransferOptions(
                "simulated",
                "kv_consumer",
                keep_timeout_s=timeout,
                receive_timeout_s=timeout,
                kept_share=options.kept_share,
            ),
            self._connector,
            simulator.executor,
            simulator.lending,
            simulator.clock,
            received=self.received,
            wake=lambda: None,
            weights=lambda directory: "weights" if directory is None else str(Path(directory)),
            tally=TransferTally([], "simulated"),
        )
        self.exchange.random = self.random
        self._told: set[Sequence] = set()
        # By cache root: whose it is, as the simulator has it.
        self._names: dict[str, Name] = {}
        # By request: what its answer says of its pages.
        self._params: dict[str, Json] = {}

    @property
    def is_busy(self) -> bool:
        exchange = self.exchange
        return bool(exchange._tasks or exchange._overdue or exchange._kept or self._simulator.scheduler.num_receiving)

    def told(self, arrival: Arrival) -> Request:
        """A request with what a router knows when it comes: nothing, where the other one has not ended."""
        assert arrival.follows is not None
        params = self._params.get(arrival.follows)
        source = RemotePages(None, None, None, None)
        if params is not None:
            num_pages = None if self.random.random() < 0.2 else len(params["remote_block_ids"])
            source = RemotePages(params["remote_engine_id"], params["remote_request_id"], "somewhere", 1, num_pages)
        return dataclasses.replace(arrival.request, transfer=Transfer(source=source))

    def receive(self, sequence: Sequence) -> None:
        request = sequence.request
        assert request.transfer is not None and request.transfer.source is not None
        self._names[request.cache_root] = _name_of(request)
        self._loop.call_soon(self.exchange.receive, sequence, request.transfer.source)

    def received(self, sequence: Sequence) -> None:
        assert sequence not in self._told, f"{sequence} is told twice"
        self._told.add(sequence)
        self._simulator.scheduler.received(sequence)

    def ended(self, sequence: Sequence) -> None:
        """What the Publisher does where an answer has ended well."""
        transfer = sequence.request.transfer
        if transfer is not None and transfer.keep:
            params = self.exchange.keep(sequence)
            if params is not None:
                self._params[sequence.request.request_id] = params

    def carried(self, source: int, into: int, *, is_described: bool) -> None:
        """Of two pages, before the one is copied."""
        simulator = self._simulator
        assert not simulator.scheduler.kv_cache.is_free()[into - 1], f"page {into}, which is nobody's, is filled"
        [name] = [
            self._names[pages.namespace]
            for pages in simulator.lending.lent
            if any(into in own for own in pages.lists) and pages.namespace in self._names
        ]
        if is_described:
            written = simulator.page_namespace[source]
            assert written[1] == name[1], f"page {source} of adapter {written[1]} goes to adapter {name[1]}"
        simulator.page_namespace[into] = name

    def turn(self, *, hurry: bool = False) -> None:
        """Some words are said, and some pages are carried."""
        exchange = self.exchange
        if hurry and not self._simulator.open:
            for name in list(exchange._kept):
                exchange._let_go(name, "expired")
        while True:
            self._loop.turn()
            if not self._connector.copying or not (hurry or self.random.random() < self._eagerness):
                return
            self._connector.turn()

    def check(self) -> None:
        """Who receives has been told of nothing yet."""
        assert not self.exchange.tally.failures["internal"], "a transfer failed in this server"
        for sequence in self._told:
            assert sequence.status is not SequenceStatus.RECEIVING, f"{sequence} was told and waits on"

    def close(self) -> None:
        """Also of a run that has failed amid all."""
        with contextlib.suppress(BaseException):
            for task in self.exchange._tasks:
                task.cancel()
            self._loop.turn()
        self._loop.close()


def _name_of(request: Request) -> Name:
    return request.namespace, None if request.adapter is None else request.adapter.version
