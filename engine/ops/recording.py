"""Steps of few tokens as lists of native calls: what Python says to the kernels once, it need not say again.

A layer of few tokens costs more Python than arithmetic. So the layers of a step are run once under a watch that notes
every native call and hands out all memory; the next step of as many tokens is one call that makes the noted ones
again, on the same memory: the same kernels with the same arguments, so the same bits. Whatever the watch cannot
answer for (an operation of torch that is more than a view, a kernel that is not in REPLAYED) is not recorded, and such
a model goes on as before. Used by the executor's thread, through the attention backend, whose memory the calls name.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops import native
from engine.ops.ranks import RanksEndedError

# Tokens of a step up to which Python is worth saving.
MOST_TOKENS = 64
# Numbers of tokens that are kept recorded, and bytes that the memory of all of them may come to.
MOST_RECORDINGS = 16
MOST_BYTES = 256 << 20
# Kernels with the same arguments in every step: addresses of weights, of the recording's memory and of the backend's.
REPLAYED = (
    *("ol_linear", "ol_linear_codes", "ol_linear_blocks", "ol_rms_norm", "ol_gate_and_mul", "ol_attention"),
    *("ol_copy_rows", "ol_ranks_sum", "ol_convolve", "ol_recur", "ol_gate", "ol_gated_norm"),
)
# The rest of a kernel that was tried before: made again, that one does it all.
CONTINUED = ("ol_ranks_go_on",)


class _Memory:
    """Pieces of memory that a recording keeps; one that no tensor uses any more is handed out again."""

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, weakref.ref[np.ndarray] | None]] = []
        self.num_bytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = max(64, int(np.prod(shape)) * dtype.itemsize)
        found = None
        for index, (piece, user) in enumerate(self._pieces):
            if (user is None or user() is None) and size <= len(piece) <= 2 * size:
                found = index
                break
        if found is None:
            raw = np.empty(size + 64, np.uint8)
            start = -raw.ctypes.data % 64
            found = len(self._pieces)
            self._pieces.append((raw[start : start + size], None))
            self.num_bytes += size
        piece = self._pieces[found][0]
        lent = piece[:size]  # the tensor has the only reference to it
        self._pieces[found] = (piece, weakref.ref(lent))
        return torch.from_numpy(lent)[: int(np.prod(shape)) * dtype.itemsize].view(dtype).view(tuple(shape))


class _Watch(TorchDispatchMode):
    """Sees every operation of torch: gives memory of the recording, lets views pass, notes anything else."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory
        self.other: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What is never compiled need not be kept from torch's compiler, which would be imported for that at the first
        operation: amid the first request, for a second or two."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("device") in (None, torch.device("cpu")):
            return self._memory.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        result = func(*args, **kwargs)
        if not _is_view(func, args[0] if args else None, result):
            self.other = self.other or str(func)
        return result


def _is_view(func: Any, given: object, result: object) -> bool:
    """It has given the same memory in another shape, and written none: `reshape` copies where it must."""
    if any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments):
        return False
    found = result if isinstance(result, (list, tuple)) else [result]
    return isinstance(given, Tensor) and all(
        isinstance(each, Tensor) and each.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        for each in found
    )


class _Handle:
    """Stands for the kernels: notes what the recording thread calls, and calls it."""

    def __init__(self, handle: Any, notes: _Notes) -> None:
        self._handle, self._notes = handle, notes

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._handle, name)

        def call(*args: Any) -> Any:
            if threading.get_ident() == self._notes.thread:
                self._notes.add(name, args)
            return function(*args)

        return call


class _Notes:
    def __init__(self, library: native.Library) -> None:
        self._library = library
        self.thread = threading.get_ident()
        self.words: list[int] = []
        self.count = 0
        self.waits = False
        self.other: str | None = None

    def add(self, name: str, args: Sequence[Any]) -> None:
        if name in CONTINUED:
            return
        if name.startswith("ol_") and name not in REPLAYED:
            self.other = self.other or name
            return
        kinds = native.argument_kinds(name)
        entry = self._library.entries[name]
        words = [_word(kind, value) for kind, value in zip(kinds, args, strict=True)]
        self.words += [entry, len(words), *words]
        self.count += 1
        self.waits = self.waits or name == "ol_ranks_sum"


def _word(kind: Any, value: Any) -> int:
    """An argument as the 64 bits that kernels.cpp takes it from."""
    if kind is ctypes.c_float:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (int(value) if value is not None else 0) & (2**64 - 1)


@contextmanager
def _noting(library: native.Library) -> Iterator[_Notes]:
    """Notes of this thread's native calls meanwhile."""
    notes = _Notes(library)
    hold, release = library.hold, library.release
    library.hold, library.release = _Handle(hold, notes), _Handle(release, notes)  # type: ignore[assignment]
    try:
        yield notes
    finally:
        library.hold, library.release = hold, release


@dataclass(frozen=True, slots=True)
class _Recording:
    """waits: for other ranks, which the event loop must not do, too."""

    begin: Tensor
    end: Tensor
    words: np.ndarray
    count: int
    waits: bool
    memory: _Memory


class Recordings:
    """Those of one attention backend's memory, by number of tokens. `clear` when that memory moves."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int, int], _Recording | None] = OrderedDict()
        self._seen: set[tuple[int, int]] = set()
        self._owner: weakref.ref[object] = weakref.ref(self)
        # Whether the attention of the planned step takes so long that the GIL is to be given up for it.
        self.releases = False
        # Why the last try was in vain.
        self.refused: str | None = None

    def __len__(self) -> int:
        return sum(each is not None for each in self._found.values())

    def clear(self) -> None:
        self._found.clear()
        self._seen.clear()

    def run(self, owner: object, x: Tensor, layers: Callable[[Tensor], Tensor], *, releases: bool) -> Tensor:
        """layers(x), [T, width] -> [T, width], x written over; releases: whether their products take that long.

        layers: the same of one owner in every step, but for what the backend has planned. A number of tokens is
        recorded when it comes for the second time.
        """
        library = native.library()
        if library is None or not x.is_cpu or not 0 < x.shape[0] <= MOST_TOKENS:
            return layers(x)
        if self._owner() is not owner:
            self.clear()
            self._owner = weakref.ref(owner)
        key = x.shape[0], torch.get_num_threads()
        if key not in self._found:
            if key not in self._seen:
                self._seen.add(key)
                return layers(x)
            return self._record(library, key, x, layers)
        recording = self._found[key]
        if recording is None:
            return layers(x)
        self._found.move_to_end(key)
        recording.begin.copy_(x)
        handle = library.release if releases or self.releases or recording.waits else library.hold
        if handle.ol_replay(recording.words.ctypes.data, recording.count):
            raise RanksEndedError("the ranks have ended")
        return recording.end.clone()

    def _record(
        self, library: native.Library, key: tuple[int, int], x: Tensor, layers: Callable[[Tensor], Tensor]
    ) -> Tensor:
        memory = _Memory()
        begin = memory.empty(x.shape, x.dtype)
        begin.copy_(x)
        with _noting(library) as notes, _Watch(memory) as watch:
            end = layers(begin)
        self.refused = watch.other or notes.other
        if self.refused is not None or memory.num_bytes > MOST_BYTES // 4:
            self._found[key] = None
        else:
            words = np.array(notes.words, np.uint64)
            self._found[key] = _Recording(begin, end, words, notes.count, notes.waits, memory)
            self._trim()
        return end.clone()

    def _trim(self) -> None:
        def size() -> int:
            return sum(each.memory.num_bytes for each in self._found.values() if each is not None)

        while len(self._found) > MOST_RECORDINGS or size() > MOST_BYTES:
            key, _ = self._found.popitem(last=False)
            self._seen.discard(key)
