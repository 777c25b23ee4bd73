"""What attention is to a model and an executor: a spec, a protocol, and the backends there are.

A backend owns the KV memory of all layers. The executor plans a step, the model's layers then call forward in order.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine.groups import Chunk, MemoryGroup, num_buffers, places_of
from engine.ops.attention import coded

if TYPE_CHECKING:
    from engine.executor.tables import PagedMetadata
    from engine.ops.recording import Recordings
    from engine.ops.state import States

# A new backend is one file with a class `Backend` and one line here.
BACKENDS = {
    "packed": "engine.ops.attention.packed",
    "torch_paged": "engine.ops.attention.torch_paged",
}


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Shapes and variants of one layer's attention.

    value_dim: of V and of a head's output. scale: on q k. window: the tokens that a query sees, itself included, or
    None for all; a Chunk where they are those of its block. softcap: c in c * tanh(score / c), or None. sinks: each
    head has one more logit in its softmax, which has no value. reads: the earlier layer whose K and V it reads; it
    writes none. values_in_keys: V is the first value_dim numbers of its one head's K, which alone is kept.
    bidirectional: later tokens are seen, too, and nothing is kept (backend packed); a window is then to either side.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    reads: int | None = None
    values_in_keys: bool = False
    bidirectional: bool = False

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert not self.values_in_keys or (self.num_kv_heads == 1 and self.value_dim <= self.head_dim)

    def own(self, number: int) -> int:
        """The layer whose K and V it reads: itself (it has this number), or an earlier one."""
        return number if self.reads is None else self.reads

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of K and of V that it keeps of a token."""
        values = 0 if self.values_in_keys else self.value_dim
        return self.num_kv_heads * self.head_dim, self.num_kv_heads * values

    @property
    def is_plain(self) -> bool:
        """No sinks, no chunks, and K and V of its own of one size."""
        plain = not self.sinks and self.reads is None and not self.values_in_keys and not isinstance(self.window, Chunk)
        return plain and self.value_dim == self.head_dim

    @property
    def is_latent(self) -> bool:
        """Its values are in its keys, and nothing else is unusual."""
        plain = not self.sinks and self.reads is None and self.window is None and self.softcap is None
        return plain and self.values_in_keys and not self.bidirectional


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend must be built for. layers: None for one that keeps no K and V."""

    layers: tuple[LayerAttention | None, ...]

    @classmethod
    def alike(
        cls,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: tuple[int | None, ...] | None = None,
        softcap: float | None = None,
    ) -> AttentionSpec:
        """Layers that differ in nothing but their windows. window: one entry a layer, None where all see all."""
        windows = window or (None,) * num_layers
        layers = (LayerAttention(num_heads, num_kv_heads, head_dim, head_dim, scale, one, softcap) for one in windows)
        return cls(tuple(layers))

    @property
    def attending(self) -> dict[int, LayerAttention]:
        """Those that have K and V, by number."""
        return {index: layer for index, layer in enumerate(self.layers) if layer is not None}

    @property
    def bidirectional(self) -> bool:
        """Texts are computed at once, and nothing is kept of them."""
        return any(layer.bidirectional for layer in self.attending.values())

    @property
    def owners(self) -> list[int]:
        """Layers that have memory of their own, in the order of `ModelSpec.windows`."""
        return [index for index, layer in self.attending.items() if layer.reads is None]

    @property
    def common(self) -> LayerAttention | None:
        """What all layers are but for their windows; None where they differ in more, or are not plain."""
        found = {dataclasses.replace(layer, window=None) for layer in self.attending.values()}
        return found.pop() if len(found) == 1 and all(layer.is_plain for layer in self.attending.values()) else None

    @property
    def latent(self) -> LayerAttention | None:
        """What all layers are where each keeps latents and sees every token; None where they differ."""
        found = set(self.attending.values())
        shape = found.pop() if len(found) == 1 else None
        return shape if shape is not None and shape.is_latent else None

    def buffer_widths(
        self, groups: tuple[MemoryGroup, ...] = (MemoryGroup(),), dtype: torch.dtype | None = None
    ) -> list[tuple[int, int]]:
        """Numbers of K and of V of one token in every buffer: those of the widest layer that has its place there. In
        int8 with the bytes of their scales."""
        owners = self.owners
        widths = [(0, 0)] * num_buffers(groups, len(owners))
        for layer, (_, buffer) in zip(owners, places_of(groups, len(owners)), strict=True):
            of_layer = self.attending[layer]
            keys, values = of_layer.widths if dtype != torch.int8 else coded.widths(of_layer)
            widths[buffer] = max(widths[buffer][0], keys), max(widths[buffer][1], values)
        return widths

    def kv_bytes_per_token(self, dtype: torch.dtype, groups: tuple[MemoryGroup, ...] = (MemoryGroup(),)) -> int:
        """Bytes of K and V of one token in the layers of one memory group, which are all where there is one. dtype: of
        the pools."""
        return sum(map(sum, self.buffer_widths(groups, dtype))) * dtype.itemsize


class AttentionBackend(Protocol):
    """Paged attention over pools of num_pages + 1 pages, K and V, per layer that has memory of its own.

    states: where layers with a recurrent state find it, for the backend is what they are handed; None where none has.
    recordings: of steps through its memory; None where they are not to be recorded.
    """

    states: States | None
    recordings: Recordings | None

    def release(self) -> None:
        """Give the pools' memory back."""
        ...

    def allocate(self) -> None:
        """Have pools again, after `release`."""
        ...

    def plan(self, *groups: PagedMetadata) -> None:
        """Take up a step, in which each memory group has its page ids; its arrays stay untouched until it is done."""
        ...

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cos_sin: Tensor | None = None,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq * Dv].

        Writes k and v of all rows to the pool before any row attends, so rows of one step may share pages. Both are
        None for a layer that reads another's, v where it is in k. With cos_sin (see ops/rope.py) it also turns q, in
        place, and k, which saves the call of apply_rope. sinks: float32 [Hq], where the layer has them.
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
