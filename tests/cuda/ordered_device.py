"""A fake device that checks what orders what, instead of trying its luck: vector clocks for the streams and the host.

Every access of a tensor is noted by memory and byte ranges; of what is indexed by rows (the pages and tokens of KV
memory, states, snapshots) those rows alone. Two that overlap, one of them a write, must be ordered by stream order, an
event or a wait of the host. A host thread that issues work of its own knows what it has waited for itself, or what it
was told (`heard`) of another's. Memory that Python lets go of is what the caching allocator makes of it:
its stream may use it again at once, so that all that other streams did with it must be ordered before.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.cuda.fake_device import FakeDevice, FakeEvent, Mode, operation_of, refuse_waits, tensors_of

HOST, OTHER_HOST = "host", "another thread of the host"
Clock = dict[str, int]
# Bytes [begin, end) of a memory, in order and apart.
Spans = tuple[tuple[int, int], ...]


class Access(NamedTuple):
    """Of a memory, by `who` at its time `at`."""

    spans: Spans
    who: str
    at: int
    writes: bool
    what: str


def _bytes_of(tensor: Tensor, rows: Tensor | None = None) -> Spans:
    """rows: ids, of which the tensor is indexed by its first dimension; None: all of it."""
    begin = tensor.storage_offset() * tensor.itemsize
    if rows is None and tensor.is_contiguous():
        return ((begin, begin + tensor.numel() * tensor.itemsize),)
    sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
    if rows is not None:
        sizes = sizes[1:]
    length = (sum([(size - 1) * stride for size, stride in sizes]) + 1) * tensor.itemsize
    if rows is None:
        return ((begin, begin + length),)
    step = tensor.stride(0) * tensor.itemsize
    spans: list[tuple[int, int]] = []
    for row in sorted({row % len(tensor) for row in rows.flatten().tolist()}):
        start = begin + row * step
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], start + length)
        else:
            spans.append((start, start + length))
    return tuple(spans)


def _overlap(a: Spans, b: Spans) -> bool:
    if not a or not b or a[-1][1] <= b[0][0] or b[-1][1] <= a[0][0]:
        return False
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i][0] < b[j][1] and b[j][0] < a[i][1]:
            return True
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return False


def _covers(a: Spans, b: Spans) -> bool:
    """Whether all of b is in a."""
    if not a or not b or b[0][0] < a[0][0] or a[-1][1] < b[-1][1]:
        return not b
    i = 0
    for begin, end in b:
        while i < len(a) and a[i][1] < end:
            i += 1
        if i == len(a) or a[i][0] > begin:
            return False
    return True


BY_INDEX = {"aten::index_select", "aten::index_copy_"}
BY_INDICES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
BY_ROWS = BY_INDEX | BY_INDICES


def _rows_of(name: str, names: dict[str, Any]) -> Tensor | None:
    """The rows of `self` that an operation of BY_ROWS reads or writes; None: any."""
    if name in BY_INDEX and names["dim"] != 0:
        return None
    rows = names["index"] if name in BY_INDEX else names["indices"][0]
    return rows if isinstance(rows, Tensor) and rows.dtype in (torch.int32, torch.int64) else None


def _tensors(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(tree) if tensor.numel()]


def _is_view_of(result: Any, args: Any) -> bool:
    """The quick answer for what is asked most: one tensor, of the first argument's memory."""
    if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
        return False
    return result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def _join(clock: Clock, other: Clock) -> None:
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


class _Noting(Mode):
    """Notes what operations read and write, in the name of one piece of work."""

    def __init__(self, device: OrderedDevice, who: str, clock: Clock) -> None:
        super().__init__()
        self.device, self.who, self.clock = device, who, clock
        # Whether this is a step's work, in which nothing makes the host wait: two modes would take twice as long.
        self.refuses_waits = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = operation_of(func)
        if self.refuses_waits:
            refuse_waits(operation, args)
        result = func(*args, **kwargs)
        if operation.is_view and not operation.written and _is_view_of(result, args):
            return result
        given = _tensors((args, kwargs))
        memory = {tensor.untyped_storage().data_ptr() for tensor in given}
        written = _tensors(operation.changed(args, kwargs)) if operation.written else []
        fresh = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in memory]
        if operation.is_view and not written and not fresh:
            return result
        note, name = self.device.note, operation.name
        rows = whole = None
        if name in BY_ROWS:
            names = operation.named(args, kwargs)
            rows, whole = _rows_of(name, names), names.get("self")
        for tensor in given:
            if not any(tensor is other for other in written):
                of = rows if tensor is whole else None
                note(tensor, self.who, self.clock, writes=False, what=name, rows=of)
        for tensor in written:
            of = rows if tensor is whole else None
            note(tensor, self.who, self.clock, writes=True, what=name, rows=of)
        for tensor in fresh:
            self.device.own(tensor, self.who)
            note(tensor, self.who, self.clock, writes=True, what=name)
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
        # Threads whose waits are not the loop's. Others', as the waiter's, are at once what the loop knows.
        self._others: set[int] = set()

    # ---- what is noted

    def note(
        self, tensor: Tensor, who: str, clock: Clock, *, writes: bool, what: str, rows: Tensor | None = None
    ) -> None:
        """rows: those ids' of the first dimension alone."""
        spans = _bytes_of(tensor, rows)
        log = self._log(tensor.untyped_storage())
        kept = []
        for old in log:
            ordered = old.who == who or clock.get(old.who, 0) >= old.at
            if not ordered and (writes or old.writes) and _overlap(spans, old.spans):
                verbs = ["writes" if each else "reads" for each in (writes, old.writes)]
                self.found[f"{who} {verbs[0]} ({what}) while {old.who} {verbs[1]} ({old.what})"] += 1
            # Whatever comes later is ordered behind those if it is behind this one.
            covered = ordered and (writes or (old.who == who and not old.writes)) and _covers(spans, old.spans)
            if not covered:
                kept.append(old)
        log[:] = kept
        access = Access(spans, who, clock.get(who, 0), writes, what)
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
        _join(clock, self._clocks[self._host()])
        for old in log:
            if old.who not in (who, HOST, OTHER_HOST) and clock.get(old.who, 0) < old.at:
                self.found[f"memory of {who} is let go of while {old.who} uses it ({old.what})"] += 1

    # ---- what the host's threads know

    def _host(self) -> str:
        return OTHER_HOST if threading.get_ident() in self._others else HOST

    def known(self) -> Clock:
        """To the calling thread by now, to be told to another."""
        with self._lock:
            return self._tick(self._host())

    def heard(self, clock: Clock, *, apart: bool = False) -> None:
        """The calling thread is told of that. apart: from here on it knows no more than it waits for and hears."""
        with self._lock:
            if apart:
                self._others.add(threading.get_ident())
            _join(self._clocks[self._host()], clock)

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
        with self._lock:
            _join(self._clocks[who], self._clocks[self._host()])
            if waits is not None:
                _join(self._clocks[who], self._events.get(waits[0], {}))
            clock = self._tick(who)
            if records is not None:
                self._events[records] = clock

            def noted() -> None:
                with _Noting(self, who, clock) as self._noting:
                    run()

            super()._enqueue(noted, waits, records)

    def _compute(self, work: Callable[[], object]) -> None:
        self._noting.refuses_waits = True
        work()

    def kernel(self, work: Callable[[], object]) -> None:
        if self.recorder is not None:
            super().kernel(work)
            return
        who = self._name() if self.current is not None else self._host()
        with _disable_current_modes(), _Noting(self, who, dict(self._clocks[who])):
            work()

    def upload(self, to: Tensor, source: Tensor) -> None:
        # The host has filled the source for this copy.
        with self._lock:
            host = self._host()
            self.note(source, host, self._tick(host), writes=True, what="fills what is uploaded")
        super().upload(to, source)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = super().zeros(shape, dtype)
        if self.current is not None and memory.numel():
            self.own(memory, self._name())
        return memory

    def is_done(self, event: FakeEvent) -> bool:
        done = super().is_done(event)
        if done:
            self.heard(self._events.get(event, {}))
        return done

    def synchronize(self, event: FakeEvent) -> None:
        super().synchronize(event)
        self.heard(self._events.get(event, {}))

    def synchronize_all(self) -> None:
        super().synchronize_all()
        for who in list(self._clocks):
            self.heard(self._clocks[who])

    def _copy(self, to: Tensor, source: Tensor) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype
        self._enqueue(lambda: to.copy_(source))
