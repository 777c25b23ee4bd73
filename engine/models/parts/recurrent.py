"""Mixers with a recurrent state: short convolutions, gated delta nets, Mamba 2. Run by the executor's thread.

A layer finds its state at the attention backend, by its number; the executor has saved and loaded it before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engine.models.mixers import GatedDelta, Mamba2, ShortConv
from engine.models.parts.source import Source
from engine.ops.attention.base import AttentionBackend
from engine.ops.linear import Product
from engine.ops.norm import Normed
from engine.ops.recurrence import Recurrence, causal_conv, gated_norm, silu_gate
from engine.ops.state import StatePlan, States


def _find(attention: AttentionBackend) -> States:
    states = attention.states
    assert states is not None, "a model with states runs without memory for them"
    return states


def _taps(source: Source, name: str, channels: int, taps: int) -> Tensor:
    """The weight of a depthwise convolution, float32 [taps, channels]."""
    return source.tensor(f"{name}.weight", (channels, 1, taps), torch.float32)[:, 0].T.contiguous()


def _bias(source: Source, name: str, channels: int, given: bool) -> Tensor | None:
    return source.tensor(f"{name}.bias", (channels,), torch.float32) if given else None


class ShortConvolution:
    """LFM2's: out(c * convolution(b * x))."""

    def __init__(self, spec: ShortConv, source: Source, layer: int, prefix: str, hidden_size: int) -> None:
        prefix += "conv."
        size = spec.hidden_size  # of a rank's part less than the model's
        self._layer, self._size = layer, size
        self._input = source.linear([f"{prefix}in_proj"], [3 * size], hidden_size, bias=spec.bias)
        self._weight = _taps(source, f"{prefix}conv", size, spec.taps)
        self._bias = _bias(source, f"{prefix}conv", size, spec.bias)
        self._output = source.linear([f"{prefix}out_proj"], [hidden_size], size, bias=spec.bias)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]."""
        states = _find(attention)
        b, c, x = self._input(x).split(self._size, 1)
        mixed = states.advance(partial(self._advance, states), b * x)
        return self._output.later(mixed.mul_(c))

    def _advance(self, states: States, x: Tensor, plan: StatePlan) -> Tensor:
        return causal_conv(x, self._weight, self._bias, *states.of(self._layer), plan, silu=False)


class DeltaNet:
    """A gated delta net, with all that is projected in one product."""

    def __init__(self, spec: GatedDelta, source: Source, layer: int, prefix: str, hidden_size: int) -> None:
        prefix += "linear_attn."
        heads, keys, values = spec.num_heads, spec.num_key_heads * spec.key_dim, spec.num_heads * spec.value_dim
        self._layer, self._heads, self._eps = layer, heads, spec.norm.eps
        rows = [spec.channels, values, heads, heads]
        self._sections = rows
        self._convolved = [keys, keys, values]
        packed = len(spec.projections) == 2
        self._input = source.linear(
            [prefix + name for name in spec.projections],
            [spec.channels + values, 2 * heads] if packed else rows,
            hidden_size,
            order=_unpacked(spec) if packed else None,
        )
        self._weight = _taps(source, f"{prefix}conv1d", spec.channels, spec.taps)
        rate = source.tensor(f"{prefix}A_log", (heads,), torch.float32).exp()
        step_bias = source.tensor(f"{prefix}dt_bias", (heads,), torch.float32)
        self._recur = Recurrence(
            delta=True,
            key_heads=spec.num_key_heads,
            heads=heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            rate=rate,
            step_bias=step_bias,
        )
        norm = f"{prefix}{spec.norm.name}.weight"
        self._norm = source.tensor(norm, (spec.value_dim,), torch.float32)
        self._output = source.linear([f"{prefix}out_proj"], [hidden_size], values)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]."""
        states = _find(attention)
        qkv, z, share, step = self._input(x).split_with_sizes(self._sections, 1)
        mixed = states.advance(partial(self._advance, states), qkv, step, share)
        return self._output.later(gated_norm(mixed, z, self._norm, self._eps, self._heads))

    def _advance(self, states: States, qkv: Tensor, step: Tensor, share: Tensor, plan: StatePlan) -> Tensor:
        columns, matrices = states.of(self._layer)
        qkv = causal_conv(qkv, self._weight, None, columns, plan, silu=True)
        q, k, v = qkv.split_with_sizes(self._convolved, 1)
        return self._recur(q, k, v, step, share, matrices, plan)


def _unpacked(spec: GatedDelta) -> Tensor:
    """Rows of a checkpoint that goes from key head to key head, [q k v z] and then [b a], as q, k, v, z, b, a."""
    served = spec.num_heads // spec.num_key_heads
    own = served * spec.value_dim
    parts: list[Tensor] = []
    at = 0
    for widths in ((spec.key_dim, spec.key_dim, own, own), (served, served)):
        rows = torch.arange(spec.num_key_heads * sum(widths)).view(spec.num_key_heads, -1) + at
        parts += [part.flatten() for part in rows.split_with_sizes(widths, 1)]
        at += rows.numel()
    return torch.cat(parts)


class Mamba:
    """Mamba 2, with all that is projected in one product."""

    def __init__(self, spec: Mamba2, source: Source, layer: int, prefix: str, hidden_size: int) -> None:
        prefix += f"{spec.name}."
        heads, inner, groups = spec.num_heads, spec.inner_size, spec.num_groups * spec.state_size
        self._layer, self._spec = layer, spec
        self._sections = [inner, spec.channels, heads]
        self._convolved = [inner, groups, groups]
        self._input = source.linear([f"{prefix}in_proj"], [sum(self._sections)], hidden_size, bias=spec.bias)
        self._factors: Tensor | None = None
        if spec.multipliers is not None:
            widths = torch.tensor([inner, inner, groups, groups, heads])
            factors = torch.tensor(spec.multipliers).repeat_interleave(widths)
            self._factors = factors.to(source.dtype).to(source.device)
        self._weight = _taps(source, f"{prefix}conv1d", spec.channels, spec.taps)
        self._bias = _bias(source, f"{prefix}conv1d", spec.channels, spec.conv_bias)
        rate, step_bias, skip = (
            source.tensor(prefix + name, (heads,), torch.float32) for name in ("A_log", "dt_bias", "D")
        )
        self._recur = Recurrence(
            delta=False,
            key_heads=spec.num_groups,
            heads=heads,
            key_dim=spec.state_size,
            value_dim=spec.head_dim,
            rate=rate.exp(),
            step_bias=step_bias,
            skip=skip,
            steps=spec.steps,
        )
        self._norm: Tensor | None = None
        if spec.norm is not None:
            self._norm = source.tensor(f"{prefix}{spec.norm.name}.weight", (inner,), torch.float32)
        self._output = source.linear([f"{prefix}out_proj"], [hidden_size], inner, bias=spec.output_bias)

    def __call__(
        self, x: Tensor | Normed, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]."""
        states = _find(attention)
        spec, projected = self._spec, self._input(x)
        if self._factors is not None:
            projected = projected * self._factors
        gate, mixed, step = projected.split_with_sizes(self._sections, 1)
        y = states.advance(partial(self._advance, states), mixed, step)
        if spec.norm is None or self._norm is None:
            return self._output.later(silu_gate(y, gate))
        first = not spec.norm_first
        return self._output.later(gated_norm(y, gate, self._norm, spec.norm.eps, spec.norm_parts, gate_first=first))

    def _advance(self, states: States, mixed: Tensor, step: Tensor, plan: StatePlan) -> Tensor:
        columns, matrices = states.of(self._layer)
        mixed = causal_conv(mixed, self._weight, self._bias, columns, plan, silu=True)
        values, k, q = mixed.split_with_sizes(self._convolved, 1)
        return self._recur(q, k, values, step, None, matrices, plan)
