"""Attention in both directions over whole texts, one behind the other without padding; keeps nothing between steps.

Used by the executor's thread alone. A text is one row of a step, from its first token to its last.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.attention.base import AttentionSpec
from engine.ops.rope import apply_rope

if TYPE_CHECKING:
    from engine.executor.tables import PagedMetadata


class Backend:
    """AttentionBackend without memory: what it is told of pages is not looked at."""

    def __init__(self, spec: AttentionSpec, *, dtype: torch.dtype, **_: Any) -> None:
        self.spec = spec
        self._dtype = dtype
        self._windows = spec.window or (None,) * spec.num_layers
        self._bounds: list[tuple[int, int]] = []
        self._positions = torch.zeros(0, dtype=torch.int32)

    def allocate(self) -> None:
        """There is nothing to have."""

    def release(self) -> None:
        """There is nothing to give back."""

    def plan(self, *groups: PagedMetadata) -> None:
        """See AttentionBackend."""
        metadata = groups[0]
        ends = metadata.qo_indptr[: metadata.num_rows + 1].tolist()
        self._bounds = list(itertools.pairwise(ends))
        assert all(end - start == length for (start, end), length in zip(self._bounds, metadata.kv_len, strict=True))
        self._positions = torch.from_numpy(metadata.positions)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None = None) -> Tensor:
        """See AttentionBackend."""
        if cos_sin is not None:
            apply_rope(q, k, cos_sin, self._positions)
        window = self._windows[layer]
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for start, end in self._bounds:
            part = slice(start, end)
            out[part] = attend_both_ways(self.spec, window, q[part], k[part], v[part]).flatten(1)
        return out


def attend_both_ways(spec: AttentionSpec, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, Hq, D], keys and values [N, Hkv, D] of one text -> [N, Hq, D]. window: tokens to either side, its own one
    included."""
    queries, keys, values = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    mask = None
    if window is not None and window < len(q):
        place = torch.arange(len(q), device=q.device)
        mask = (place[:, None] - place).abs() < window
    if spec.softcap is None:
        result = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=spec.scale, enable_gqa=True
        )[0]
    else:
        group = spec.num_heads // spec.num_kv_heads
        scores = queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * spec.scale
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        result = (scores.softmax(-1) @ values.float().repeat_interleave(group, 0)).to(q.dtype)
    return result.transpose(0, 1)
