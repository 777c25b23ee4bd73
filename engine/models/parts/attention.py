"""Grouped-query attention as a layer has it: projections, norms, rope and the backend's attention.

Takes its tensors when it is built and is a plain callable afterwards. Run by the executor's thread; a layer issues
few operations, for each costs 1 to 25 us of Python on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.mixers import GroupedQueryAttention, NormSpec, OutputGate, QueryScale
from engine.models.parts.norm import Norm, OwnNorms, make_norm
from engine.models.parts.rope import split_pairs
from engine.models.parts.source import Source
from engine.ops.activation import by_rows
from engine.ops.attention.base import AttentionBackend
from engine.ops.attention.device import HeadNorms, StepAttention
from engine.ops.linear import Product
from engine.ops.norm import Normed, as_rows
from engine.ops.recurrence import sigmoid_gate
from engine.ops.rope import apply_rope


def query_factors(scale: QueryScale, positions: Tensor) -> Tensor:
    """[T] -> float32 [T, 1]."""
    steps = torch.div(positions + scale.offset, scale.original_max_position, rounding_mode="floor")[:, None]
    return 1 + scale.beta * by_rows(torch.log1p, steps)


class Attention:
    """Fused projection to q, k and v, norms on q and k where the family has them, rope, attention, projection.

    layer: its number, by which the backend knows it. prefix: of its tensors. input_size: of what it reads, where that
    is not the hidden size.
    """

    def __init__(
        self,
        spec: GroupedQueryAttention,
        source: Source,
        layer: int,
        prefix: str,
        hidden_size: int,
        input_size: int | None = None,
    ) -> None:
        dim, heads, value_dim = spec.head_dim, spec.num_heads, spec.value_dim or spec.head_dim
        kv_heads = spec.num_kv_heads if spec.reads is None else 0
        self._layer = layer
        self._head_dim, self._value_dim = dim, value_dim
        self._heads, self._split = heads + 2 * kv_heads, [heads, kv_heads, kv_heads]
        rope = spec.rope
        order = split_pairs(heads + kv_heads, dim, rope.rotary_dim) if rope is not None and rope.interleaved else None
        # A layer that reads another's keys and values has queries alone.
        self._rows = [heads * dim, kv_heads * dim, kv_heads * value_dim] if kv_heads else [heads * dim]
        self._values_of_keys = spec.values_of_keys and kv_heads > 0
        if self._values_of_keys:
            self._rows.pop()
        rows = list(self._rows)
        self._gates = heads * dim if spec.gated_queries else 0
        if self._gates:
            assert order is None and value_dim == dim and kv_heads and not self._values_of_keys
            # From each head's query and gate to all queries and all gates.
            order = torch.arange(2 * heads * dim).view(heads, 2, dim).transpose(0, 1).flatten()
            rows[0] += self._gates
        if spec.heads_together:
            served = heads // kv_heads
            assert order is None and value_dim == dim and len(spec.qkv) == 1
            by_key_head = torch.arange(sum(rows)).view(kv_heads, served + 2, dim).split_with_sizes([served, 1, 1], 1)
            order = torch.cat([part.flatten() for part in by_key_head])
        self._qkv = source.linear(
            [prefix + name for name in spec.qkv],
            rows if len(spec.qkv) == len(rows) else [sum(rows)],
            input_size or hidden_size,
            bias=spec.qkv_bias,
            order=order,
        )
        self._output = source.linear([prefix + spec.output], [hidden_size], heads * value_dim, bias=spec.output_bias)
        self.products = self._qkv, self._output
        self._gate = None if spec.gate is None else Gate(spec.gate, heads, value_dim, source, prefix, hidden_size)
        self._clip, self._value_scale = spec.clip, spec.value_scale
        self._sinks = None if spec.sinks is None else source.tensor(prefix + spec.sinks, (heads,), torch.float32)
        self._norm_after_rope = spec.norm_after_rope
        self._query_scale = spec.query_scale
        q_norm, k_norm = spec.q_norm, spec.k_norm if kv_heads else None
        q_width, k_width = (heads * dim, kv_heads * dim) if spec.norm_width != "head" else (dim, dim)
        self._norm_widths = (q_width, k_width)

        def norm(spec_of: NormSpec | None, count: int, width: int) -> Norm | None:
            if spec_of is None:
                return None
            if spec.norm_width != "own":
                return make_norm(spec_of, source, prefix, width)
            pairs = split_pairs(1, dim, rope.rotary_dim) if rope is not None and rope.interleaved else None
            return OwnNorms(spec_of, source, prefix, count, dim, pairs)

        self._q_norm, self._k_norm = norm(q_norm, heads, q_width), norm(k_norm, kv_heads, k_width)
        v_norm = spec.v_norm if kv_heads else None
        self._v_norm = None if v_norm is None else make_norm(v_norm, source, prefix, value_dim)
        self._head_norms: HeadNorms | None = None
        if self._q_norm is not None and self._k_norm is not None:
            assert q_norm is not None and k_norm is not None
            plain = not (spec.norm_after_rope or spec.query_scale or q_norm.centered or k_norm.centered)
            if plain and spec.norm_width == "head" and q_norm.eps == k_norm.eps:
                self._head_norms = (self._q_norm.weight, self._k_norm.weight, q_norm.eps)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]. table: of `rope_table`; the backend turns q and k by it as it goes."""
        qkv = self._qkv(x)
        if self._clip is not None:
            qkv = qkv.clamp_(-self._clip, self._clip)
        gate: Tensor | None = None
        if not self._gates:
            q, k, v = self._split_heads(qkv)
        else:
            queries, gate, rest = qkv.tensor_split((self._gates, 2 * self._gates), 1)
            q = queries.view(-1, self._split[0], self._head_dim)
            k, v = rest.view(-1, sum(self._split[1:]), self._head_dim).split_with_sizes(self._split[1:], 1)
        if self._v_norm is not None and v is not None:
            v = self._v_norm(as_rows(v, self._value_dim)).view(v.shape)
        if self._value_scale != 1.0 and v is not None:
            v = v * self._value_scale
        if self._head_norms is not None and isinstance(attention, StepAttention):
            y = attention.forward(self._layer, q, k, v, table, self._head_norms, sinks=self._sinks)
            return self._project(x, y, gate)
        if self._norm_after_rope and table is not None:
            apply_rope(q, k, table, positions)
            table = None
        q_width, k_width = self._norm_widths
        if self._q_norm is not None:
            q = self._q_norm(as_rows(q, q_width)).view(q.shape)
        if self._k_norm is not None and k is not None:
            k = self._k_norm(as_rows(k, k_width)).view(k.shape)
        if self._query_scale is not None:
            q = q * query_factors(self._query_scale, positions).to(q.dtype)[:, :, None]
        y = attention.forward(self._layer, q, k, v, table, sinks=self._sinks)
        return self._project(x, y, gate)

    def _project(self, x: Tensor | Normed, y: Tensor, gate: Tensor | None) -> Tensor | Product:
        """What attention gives, gated where it is."""
        if gate is not None:
            y = sigmoid_gate(y, gate)
        return self._output.later(y if self._gate is None else self._gate(x, y))

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q, k and v [T, heads, D]; no k and v in a layer that reads another's."""
        if len(self._rows) == 1:
            return qkv.view(-1, self._split[0], self._head_dim), None, None
        if self._values_of_keys:
            q, k = qkv.view(-1, sum(self._split[:2]), self._head_dim).split_with_sizes(self._split[:2], 1)
            # The backend may turn keys where they are.
            return q, k, k if self._v_norm is not None else k.clone()
        if self._value_dim == self._head_dim:
            q, k, v = qkv.view(-1, self._heads, self._head_dim).split_with_sizes(self._split, 1)
            return q, k, v
        parts = qkv.split_with_sizes(self._rows, 1)
        dims = self._head_dim, self._head_dim, self._value_dim
        q, k, v = (part.unflatten(1, (-1, dim)) for part, dim in zip(parts, dims, strict=True))
        return q, k, v


class Gate:
    """y times what the gate's projection of x gives, see OutputGate."""

    def __init__(self, spec: OutputGate, heads: int, width: int, source: Source, prefix: str, hidden_size: int) -> None:
        rows = heads if spec.by_head else heads * width
        self._project = source.linear([prefix + spec.name], [rows], hidden_size)
        self._soft, self._heads = spec.activation == "softplus", heads if spec.by_head else 0

    def __call__(self, x: Tensor | Normed, y: Tensor) -> Tensor:
        """[T, hidden] and [T, heads * width] -> the latter."""
        gate = self._project(x)
        if not self._soft and not self._heads:
            return sigmoid_gate(y, gate)
        factors = by_rows(F.softplus if self._soft else torch.sigmoid, gate).to(y.dtype)
        if not self._heads:
            return y * factors
        return (y.unflatten(1, (self._heads, -1)) * factors[:, :, None]).flatten(1)
