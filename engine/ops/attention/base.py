"""What attention is to a model and an executor: a spec, a protocol, and the backends there are.

A backend owns the KV memory of all layers. The executor plans a step, the model's layers then call forward in order.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine.groups import MemoryGroup, num_buffers

if TYPE_CHECKING:
    from engine.executor.tables import PagedMetadata

# A new backend is one file with a class `Backend` and one line here.
BACKENDS = {
    "packed": "engine.ops.attention.packed",
    "torch_paged": "engine.ops.attention.torch_paged",
}


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shapes and variants of a model's attention.

    scale: on q k. window: one entry a layer, the tokens that a query sees (itself included) or None for all; None
    when no layer has one. softcap: c in c * tanh(score / c), or None. bidirectional: later tokens are seen, too, and
    nothing is kept (backend packed); a window is then to either side.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: tuple[int | None, ...] | None = None
    softcap: float | None = None
    bidirectional: bool = False

    def kv_bytes_per_token(self, dtype: torch.dtype, groups: tuple[MemoryGroup, ...] = (MemoryGroup(),)) -> int:
        """Bytes of K and V of one token in the layers of one memory group, which are all where there is one."""
        return 2 * num_buffers(groups, self.num_layers) * self.num_kv_heads * self.head_dim * dtype.itemsize


class AttentionBackend(Protocol):
    """Paged attention over pools [num_pages + 1, page_size, kv_heads, head_dim], K and V, per layer."""

    def release(self) -> None:
        """Give the pools' memory back."""
        ...

    def allocate(self) -> None:
        """Have pools again, after `release`."""
        ...

    def plan(self, *groups: PagedMetadata) -> None:
        """Take up a step, in which each memory group has its page ids; its arrays stay untouched until it is done."""
        ...

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None = None) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq * D].

        Writes k and v of all rows to the pool before any row attends, so rows of one step may share pages. With
        cos_sin (see ops/rope.py) it also turns q, in place, and k, which saves the call of apply_rope.
        """
        ...


def create_backend(
    name: str, spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, **options: Any
) -> AttentionBackend:
    """The backend of that name, with memory for num_pages + 1 pages (page 0 belongs to padding)."""
    backend: AttentionBackend = importlib.import_module(BACKENDS[name]).Backend(
        spec, num_pages=num_pages, page_size=page_size, dtype=dtype, **options
    )
    return backend
