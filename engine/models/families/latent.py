"""Latent attention as the classes that took it over from DeepSeek V2 and V3 describe it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from engine.models.families.common import Shape, read_shape
from engine.models.families.rope import read_rope, scaling_fields
from engine.models.fields import Fields, show
from engine.models.mixers import LatentAttention, NormSpec

# Of the norms between the projections: what their classes have, whatever rms_norm_eps says.
INNER_EPS = 1e-6
# More in one head than any backend was built for.
MAX_DIM = 65536


def read_latent(
    fields: Fields, *, interleaved: bool | None = None, partial: bool = False
) -> tuple[Shape, LatentAttention]:
    """The sizes of the model, and its attention. Raises StartupError.

    interleaved: None reads rope_interleave. partial: partial_rotary_factor is of a whole head, not of the part that
    turns.
    """
    heads = fields.integer("num_attention_heads")
    nope, rope_dim = (fields.integer(f"qk_{part}_head_dim", maximum=MAX_DIM) for part in ("nope", "rope"))
    latent = fields.integer("kv_lora_rank", maximum=MAX_DIM)
    rank = fields.optional_integer("q_lora_rank")
    bias = fields.flag("attention_bias")
    # What a file says of these is of other code, which cut keys and values into heads.
    given: dict[str, Any] = {"head_dim": rope_dim, "num_key_value_heads": heads}
    shape = read_shape(fields.with_values(given))
    if fields.has("v_head_dim"):
        value = fields.integer("v_head_dim", maximum=MAX_DIM)
    elif shape.hidden_size % heads:
        fields.fail("num_attention_heads", f"({heads}) must divide hidden_size ({shape.hidden_size})")
    else:
        value = shape.hidden_size // heads
    interleaved = fields.nullable_flag("rope_interleave", True) if interleaved is None else interleaved
    turned = shape
    if partial:
        turned = dataclasses.replace(shape, head_dim=nope + rope_dim)
        if not scaling_fields(fields).has("partial_rotary_factor"):
            fields = fields.with_values({"partial_rotary_factor": rope_dim / (nope + rope_dim)})
    rope = read_rope(fields, turned, renamed={"deepseek_yarn": "yarn"}, interleaved=interleaved)
    if rope.rotary_dim != rope_dim:
        fields.fail("partial_rotary_factor", f"makes {rope.rotary_dim} dimensions turn; qk_rope_head_dim is {rope_dim}")
    scale = (nope + rope_dim) ** -0.5
    scaling = scaling_fields(fields)
    mscale = scaling.number("mscale_all_dim", 0.0, minimum=0.0) if rope.kind != "default" else 0.0
    if mscale and rope.factor > 1:
        scale *= (0.1 * mscale * math.log(rope.factor) + 1.0) ** 2
    attention = LatentAttention(
        heads,
        rank,
        latent,
        nope,
        rope_dim,
        value,
        scale,
        rope,
        NormSpec("self_attn.kv_a_layernorm", INNER_EPS),
        bias=bias,
    )
    if rank is None:
        return shape, dataclasses.replace(attention, query=("self_attn.q_proj",))
    return shape, dataclasses.replace(attention, q_norm=NormSpec("self_attn.q_a_layernorm", INNER_EPS))


def refuse_other_routing(fields: Fields, expected: Mapping[str, Any]) -> None:
    """Fields of DeepSeek's own code that transformers does not read: they must say what its class does."""
    for name, value in expected.items():
        if fields.raw(name) not in (None, value):
            fields.fail(name, f"must be {show(value)} in this class, not {show(fields.raw(name))}")
