"""Grouped-query attention as a layer has it: projections, norms, rope and the backend's attention.

Takes its tensors when it is built and is a plain callable afterwards. Run by the executor's thread; a layer issues
few operations, for each costs 1 to 25 us of Python on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.parts.norm import Norm, make_norm
from engine.models.parts.rope import split_pairs
from engine.models.parts.source import Source
from engine.models.spec import GroupedQueryAttention, QueryScale
from engine.ops.activation import by_rows
from engine.ops.attention.base import AttentionBackend
from engine.ops.attention.device import HeadNorms, StepAttention
from engine.ops.linear import Product
from engine.ops.norm import Normed
from engine.ops.rope import apply_rope


def query_factors(scale: QueryScale, positions: Tensor) -> Tensor:
    """[T] -> float32 [T, 1]."""
    steps = torch.div(positions, scale.original_max_position, rounding_mode="floor")[:, None]
    return 1 + scale.beta * by_rows(torch.log1p, steps)


class Attention:
    """Fused projection to q, k and v, norms on q and k where the family has them, rope, attention, projection.

    layer: its number, by which the backend knows it. prefix: of its tensors.
    """

    def __init__(self, spec: GroupedQueryAttention, source: Source, layer: int, prefix: str, hidden_size: int) -> None:
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        self._layer = layer
        self._head_dim = dim
        self._heads = heads + 2 * kv_heads
        self._split = [heads, kv_heads, kv_heads]
        rope = spec.rope
        order = split_pairs(heads + kv_heads, dim, rope.rotary_dim) if rope is not None and rope.interleaved else None
        rows = [heads * dim, kv_heads * dim, kv_heads * dim]
        self._qkv = source.linear(
            [prefix + name for name in spec.qkv],
            rows if len(spec.qkv) == 3 else [sum(rows)],
            hidden_size,
            bias=spec.qkv_bias,
            order=order,
        )
        self._output = source.linear([prefix + spec.output], [hidden_size], heads * dim, bias=spec.output_bias)
        self._norm_after_rope = spec.norm_after_rope
        self._query_scale = spec.query_scale
        self._q_norm: Norm | None = None
        self._k_norm: Norm | None = None
        self._head_norms: HeadNorms | None = None
        if spec.q_norm is not None and spec.k_norm is not None:
            q_width, k_width = (heads * dim, kv_heads * dim) if spec.norm_width == "full" else (dim, dim)
            self._q_norm = make_norm(spec.q_norm, source, prefix, q_width)
            self._k_norm = make_norm(spec.k_norm, source, prefix, k_width)
            self._norm_widths = (q_width, k_width)
            plain = not (spec.norm_after_rope or spec.query_scale or spec.q_norm.centered or spec.k_norm.centered)
            if plain and spec.norm_width == "head" and spec.q_norm.eps == spec.k_norm.eps:
                self._head_norms = (self._q_norm.weight, self._k_norm.weight, spec.q_norm.eps)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]. table: of `rope_table`; the backend turns q and k by it as it goes."""
        q, k, v = self._qkv(x).view(-1, self._heads, self._head_dim).split_with_sizes(self._split, 1)
        if self._head_norms is not None and isinstance(attention, StepAttention):
            return self._output.later(attention.forward(self._layer, q, k, v, table, self._head_norms))
        if self._norm_after_rope and table is not None:
            apply_rope(q, k, table, positions)
            table = None
        if self._q_norm is not None and self._k_norm is not None:
            q_width, k_width = self._norm_widths
            q = self._q_norm(q.reshape(-1, q_width)).view(q.shape)
            k = self._k_norm(k.reshape(-1, k_width)).view(k.shape)
        if self._query_scale is not None:
            q = q * query_factors(self._query_scale, positions).to(q.dtype)[:, :, None]
        return self._output.later(attention.forward(self._layer, q, k, v, table))
