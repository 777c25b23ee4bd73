"""What the products of experts have in common, of numbers (experts.py) and of codes (coded_experts.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.activation import Clamped

if TYPE_CHECKING:  # which asks for these modules late
    from engine.ops.experts import Activation

# What comes of gate and up, as the kernels number it.
NONE, SILU, GELU, CLAMPED = (tl.constexpr(number) for number in range(4))
GATES = {"silu": 1, "gelu_tanh": 2}


class Pairs(NamedTuple):
    """`count` pairs by expert: see sort_pairs; not sorted, where a block is a pair's own."""

    order: Tensor
    owners: Tensor
    count: int
    is_sorted: bool


@triton.jit
def gated(total, up, limit, alpha, GATE: tl.constexpr):
    """Of gate and up in float32; see activation.py."""
    if GATE == CLAMPED:
        # A NaN stays one, or nobody would see that a row has no numbers.
        total = tl.minimum(total, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL) + 1.0
        total = total / (1.0 + tl.exp(-alpha * total))
    elif GATE == GELU:
        y = 0.7978845608028654 * (total + 0.044715 * total * total * total)
        total = total / (1.0 + tl.exp(-2.0 * y))
    else:
        total = total / (1.0 + tl.exp(-total))
    return total * up


def gate_of(activation: Activation | None) -> tuple[int, float, float]:
    """Its number, and what the clamped one is told."""
    if isinstance(activation, Clamped):
        return CLAMPED.value, *activation
    return (NONE.value if activation is None else GATES[activation]), 0.0, 0.0
