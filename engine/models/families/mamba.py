"""Mamba 2 as config.json describes it in Granite 4 and Falcon-H1. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from engine.models.fields import Fields, show
from engine.models.mixers import Mamba2, NormSpec


def read_mamba(fields: Fields, inner_size: int, norm: NormSpec | None, activation: str, **given: Any) -> Mamba2:
    """Fields that begin with mamba_. activation: the field with the convolution's. given: other fields of Mamba2.

    The norm is over each group of B and C on its own. Raises StartupError.
    """
    fields.choice(activation, ("silu", "swish"))
    heads, groups = fields.integer("mamba_n_heads"), fields.integer("mamba_n_groups")
    if inner_size % heads:
        fields.fail("mamba_n_heads", f"({heads}) must divide the size of a Mamba layer ({inner_size})")
    if heads % groups:
        fields.fail("mamba_n_groups", f"({groups}) must divide mamba_n_heads ({heads})")
    dim = inner_size // heads
    if fields.raw("mamba_d_head") not in (None, "auto") and fields.integer("mamba_d_head") != dim:
        fields.fail("mamba_d_head", f"({show(fields.raw('mamba_d_head'))}) times mamba_n_heads must be {inner_size}")
    return Mamba2(
        heads,
        dim,
        fields.integer("mamba_d_state", maximum=4096),
        groups,
        fields.integer("mamba_d_conv", minimum=2, maximum=64),
        norm,
        norm_parts=groups,
        steps=_read_steps(fields),
        conv_bias=fields.flag("mamba_conv_bias", True),
        **{"bias": fields.flag("mamba_proj_bias"), "output_bias": fields.flag("mamba_proj_bias"), **given},
    )


def _read_steps(fields: Fields) -> tuple[float, float]:
    """`time_step_limit`, two numbers; the larger may be infinite, in any of the ways that files say so."""
    value = fields.raw("time_step_limit")
    if value is None:
        return 0.0, math.inf
    found = [_number(item) for item in value] if isinstance(value, list) else []
    if len(found) == 2 and found[0] is not None and found[1] is not None and 0 <= found[0] < found[1]:
        return found[0], found[1]
    fields.fail("time_step_limit", f"must be two numbers, the larger second, not {show(value)}")


def _number(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("__float__")
    if isinstance(value, str):
        return math.inf if value in ("Infinity", "inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
