"""A fake device that checks what orders what, instead of trying its luck: vector clocks for the streams and the host.

Every access of a tensor is noted by memory and byte range. Two that overlap, one of them a write, must be ordered by
stream order, an event or a wait of the host. Memory that Python lets go of is what the caching allocator makes of it:
its stream may use it again at once, so that all that other streams did with it must be ordered before.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from tests.cuda.fake_device import FakeDevice, FakeEvent

HOST = "host"
Clock = dict[str, int]


class Access(NamedTuple):
    """Bytes [begin, end) of a memory, by `who` at its time `at`."""

    begin: int
    end: int
    who: str
    at: int
    writes: bool
    what: str


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.numel())


def _join(clock: Clock, other: Clock) -> None:
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


class _Noting(TorchDispatchMode):
    """Notes what operations read and write, in the name of one piece of work."""

    def __init__(self, device: OrderedDevice, who: str, clock: Clock) -> None:
        super().__init__()
        self.device, self.who, self.clock = device, who, clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        result = func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        memory = {tensor.untyped_storage().data_ptr() for tensor in given}
        out = list(_tensors(result))
        names = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written = list(_tensors([names.get(name) for name in writes]))
        is_view = not written and all(tensor.untyped_storage().data_ptr() in memory for tensor in out)
        if is_view and any(r.alias_info is not None for r in schema.returns):
            return result
        for tensor in given:
            if not any(tensor is other for other in written):
                self.device.note(tensor, self.who, self.clock, writes=False, what=schema.name)
        for tensor in written:
            self.device.note(tensor, self.who, self.clock, writes=True, what=schema.name)
        for tensor in out:
            if tensor.untyped_storage().data_ptr() not in memory:
                self.device.own(tensor, self.who)
                self.device.note(tensor, self.who, self.clock, writes=True, what=schema.name)
        return result


def _freed(device: weakref.ref[OrderedDevice], address: int) -> None:
    if (alive := device()) is not None:
        alive.forget(address)


class OrderedDevice(FakeDevice):
    """found: what is not ordered, and how often."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, eagerness=1.0)
        self.found: Counter[str] = Counter()
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._events: weakref.WeakKeyDictionary[FakeEvent, Clock] = weakref.WeakKeyDictionary()
        self._accesses: dict[int, list[Access]] = {}
        self._owners: dict[int, str] = {}

    # ---- what is noted

    def note(self, tensor: Tensor, who: str, clock: Clock, *, writes: bool, what: str) -> None:
        begin, end = _span(tensor)
        log = self._log(tensor.untyped_storage())
        for old in log:
            overlap = old.begin < end and begin < old.end and (writes or old.writes)
            if overlap and old.who != who and clock.get(old.who, 0) < old.at:
                verbs = ["writes" if each else "reads" for each in (writes, old.writes)]
                self.found[f"{who} {verbs[0]} ({what}) while {old.who} {verbs[1]} ({old.what})"] += 1
        if writes:  # whatever comes later is ordered behind those if it is behind this one
            log[:] = [
                old for old in log if not (begin <= old.begin and old.end <= end and clock.get(old.who, 0) >= old.at)
            ]
        access = Access(begin, end, who, clock.get(who, 0), writes, what)
        if access not in log:
            log.append(access)

    def own(self, tensor: Tensor, who: str) -> None:
        """Memory that came from the allocator while `who` was the current stream."""
        storage = tensor.untyped_storage()
        self._log(storage)
        self._owners.setdefault(storage.data_ptr(), who)

    def _log(self, storage: torch.UntypedStorage) -> list[Access]:
        """What was done with that memory while it lived: its address is soon another's, whoever it belonged to."""
        address = storage.data_ptr()
        if address not in self._accesses:
            self._accesses[address] = []
            # Weights outlive the device, and must not keep it.
            weakref.finalize(storage, _freed, weakref.ref(self), address)
        return self._accesses[address]

    def forget(self, address: int) -> None:
        """That memory is free."""
        who, log = self._owners.pop(address, None), self._accesses.pop(address)
        if who is None:  # a number that an operation was given, or what the host keeps
            return
        clock = dict(self._clocks[who])
        _join(clock, self._clocks[HOST])
        for old in log:
            if old.who not in (who, HOST) and clock.get(old.who, 0) < old.at:
                self.found[f"memory of {who} is let go of while {old.who} uses it ({old.what})"] += 1

    def _tick(self, who: str) -> Clock:
        clock = self._clocks[who]
        clock[who] = clock.get(who, 0) + 1
        return dict(clock)

    def _name(self) -> str:
        assert self.current is not None
        return ("compute", "upload", "download", "another")[min(3, self.streams.index(self.current) % 4)]

    # ---- the device

    def _enqueue(
        self,
        run: Callable[[], object],
        waits: tuple[FakeEvent, int] | None = None,
        records: FakeEvent | None = None,
    ) -> None:
        assert self.current is not None
        who = self._name()
        _join(self._clocks[who], self._clocks[HOST])
        if waits is not None:
            _join(self._clocks[who], self._events.get(waits[0], {}))
        clock = self._tick(who)
        if records is not None:
            self._events[records] = clock

        def noted() -> None:
            with _Noting(self, who, clock):
                run()

        super()._enqueue(noted, waits, records)

    def kernel(self, work: Callable[[], object]) -> None:
        if self.recorder is not None:
            super().kernel(work)
            return
        who = self._name() if self.current is not None else HOST
        with _disable_current_modes(), _Noting(self, who, dict(self._clocks[who])):
            work()

    def upload(self, to: Tensor, source: Tensor) -> None:
        # The host has filled the source for this copy.
        self.note(source, HOST, self._tick(HOST), writes=True, what="fills what is uploaded")
        super().upload(to, source)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = super().zeros(shape, dtype)
        if self.current is not None and memory.numel():
            self.own(memory, self._name())
        return memory

    def is_done(self, event: FakeEvent) -> bool:
        done = super().is_done(event)
        if done:
            _join(self._clocks[HOST], self._events.get(event, {}))
        return done

    def synchronize(self, event: FakeEvent) -> None:
        super().synchronize(event)
        _join(self._clocks[HOST], self._events.get(event, {}))

    def synchronize_all(self) -> None:
        super().synchronize_all()
        for who in list(self._clocks):
            _join(self._clocks[HOST], self._clocks[who])

    def _copy(self, to: Tensor, source: Tensor) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype
        self._enqueue(lambda: to.copy_(source))
