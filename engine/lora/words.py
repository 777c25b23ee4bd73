"""What readers of LoRA adapters, the store and executors say to each other. Imports nothing of ours."""

from __future__ import annotations

from typing import Protocol


class AdapterError(Exception):
    """An adapter that cannot be used; `str(error)` is one line that names it, what of it, and why."""


class AdapterWeights(Protocol):
    """An adapter as an executor wants it, in host memory. What else it has is that executor's own.

    rank: the highest of its modules. num_bytes: of its tensors. base_model_name: what it says it was trained on, "" for
    one that does not say. digest: of the files that it was read from; what is equal computes the same.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def base_model_name(self) -> str: ...

    @property
    def digest(self) -> str: ...
