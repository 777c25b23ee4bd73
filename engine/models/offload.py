"""Moves a model's tensors to host memory and back in place: every view of them, wherever it is held, stays valid.

Called by the CUDA executor when it goes to sleep and wakes up. And says what a model's tensors take.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Offloaded:
    """The weights of `model` on the host; the model must not run until `restore`."""

    def __init__(self, model: object) -> None:
        storages = {storage.data_ptr(): storage for storage in _storages(model) if storage.nbytes()}
        self._kept = [(storage, storage.nbytes(), _copy(storage)) for storage in storages.values()]
        # Only now, so that a copy which finds no memory leaves the model as it was.
        for storage, _, _ in self._kept:
            storage.resize_(0)

    def restore(self) -> None:
        """Everything at a new address. May raise torch.OutOfMemoryError; can be called again then."""
        for storage, size, host in self._kept:
            if not storage.nbytes():
                storage.resize_(size)
                storage.copy_(host)


class Weighed:
    """Bytes of a model's tensors, counted once for each model that it is asked about. Keeps none."""

    def __init__(self) -> None:
        self._model: weakref.ref[object] | None = None
        self._num_bytes = 0

    def __call__(self, model: object | None) -> int:
        if model is None:
            return 0
        if self._model is None or self._model() is not model:
            self._num_bytes = sum({one.data_ptr(): one.nbytes() for one in _storages(model)}.values())
            self._model = weakref.ref(model)
        return self._num_bytes


def _copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    host = torch.UntypedStorage(storage.nbytes())
    host.copy_(storage)
    return host


def _storages(root: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors that objects of ours hold, directly or in containers."""
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one.untyped_storage()
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, list | tuple):
            stack += one
        elif type(one).__module__.startswith("engine."):
            stack += [getattr(one, name) for name in getattr(one, "__slots__", ()) if hasattr(one, name)]
            stack += getattr(one, "__dict__", {}).values()
