"""Rotary embeddings as config.json describes them, in its older and its newer form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.models.families.common import Shape
from engine.models.fields import Fields, show
from engine.models.mixers import ROPE_KINDS, RopeSpec


def scaling_fields(fields: Fields, layer_type: str | None = None, scaled: bool = True) -> Fields:
    """The object that describes a rope, empty where there is none; where two forms meet, as transformers merges them.

    `rope_scaling` takes the place of `rope_parameters`, theta included; where layers differ by type, it is laid over
    what `rope_parameters` has of the type (scaled) or does not count.
    """
    newer, older = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if layer_type is not None:
        newer = newer.nested(layer_type) if newer is not None else None
        if older is None or not scaled:
            return newer or fields.empty("rope_parameters")
        return older if newer is None else older.over_values(newer)
    if older is not None and not older.is_empty:
        return older
    return newer or fields.empty("rope_parameters")


def read_rope(
    fields: Fields,
    shape: Shape,
    *,
    theta_field: str = "rope_theta",
    layer_type: str | None = None,
    scaled: bool = True,
    renamed: Mapping[str, str] | None = None,
    interleaved: bool = False,
) -> RopeSpec:
    """Read a rotary embedding in either form of config.json.

    The newer form is `rope_parameters`, flat or (layer_type) one object per layer type; the older one is `rope_theta`
    beside `rope_scaling`. theta_field, scaled: where the older form keeps the base, and whether `rope_scaling` applies
    (gemma's local rope differs in both). renamed: kinds that the family writes under another name. Raises
    StartupError.
    """
    scaling = scaling_fields(fields, layer_type, scaled)
    if scaling.has("rope_theta"):
        theta = scaling.number("rope_theta", above=0.0)
    else:
        theta = fields.number(theta_field, above=0.0)
    partial_fields = scaling if scaling.has("partial_rotary_factor") else fields
    partial = partial_fields.number("partial_rotary_factor", 1.0, above=0.0, maximum=1.0)
    kind_field = "rope_type" if scaling.has("rope_type") else "type"
    proportional = scaling.raw(kind_field) == "proportional"
    rotary_dim = shape.head_dim if proportional else int(shape.head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        fields.fail("head_dim", f"({shape.head_dim}) leaves {rotary_dim} rotary dimensions; they must be even")

    given = scaling.raw(kind_field)
    kind = (renamed or {}).get(given, given) if isinstance(given, str) else given
    if kind is None:
        kind = "default"
    if kind not in ROPE_KINDS:
        scaling.fail(kind_field, f"must be one of {', '.join(ROPE_KINDS)}, not {show(given)}")
    values: dict[str, Any] = {}
    if kind in ("linear", "dynamic", "llama3"):
        values["factor"] = scaling.number("factor", minimum=1.0)
    if kind == "proportional":
        values["factor"] = scaling.number("factor", 1.0, above=0.0)
        values["turning"] = int(partial * shape.head_dim // 2)
    if kind in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        # Phi-3 has the field beside the object, and then that one counts.
        beside = fields.has(name) and (fields.declares(name) or not scaling.has(name))
        at = fields if beside else scaling
        original = at.integer(name, shape.max_position_embeddings, minimum=2)
        values["original_max_position"] = original
    if kind == "dynamic" and rotary_dim < 4:
        fields.fail("head_dim", f"leaves {rotary_dim} rotary dimensions; dynamic rope needs at least 4")
    if kind == "llama3":
        values["low_freq_factor"] = scaling.number("low_freq_factor", above=0.0)
        values["high_freq_factor"] = scaling.number("high_freq_factor", above=values["low_freq_factor"])
    if kind == "yarn":
        factor = scaling.number("factor", shape.max_position_embeddings / original, minimum=1.0)
        values["factor"] = factor
        values["beta_fast"] = scaling.number("beta_fast", 32.0, above=0.0)
        values["beta_slow"] = scaling.number("beta_slow", 1.0, above=0.0)
        values["truncate"] = scaling.flag("truncate", True)
        values["attention_scaling"] = _yarn_attention_scaling(scaling, factor)
    if kind == "longrope":
        values["short_factor"] = scaling.numbers("short_factor", rotary_dim // 2)
        values["long_factor"] = scaling.numbers("long_factor", rotary_dim // 2)
        factor = scaling.number("factor", shape.max_position_embeddings / original, above=0.0)
        values["factor"] = factor
        # LongRoPE (arXiv 2402.13753): sqrt(1 + ln(s) / ln(original context)).
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values["attention_scaling"] = scaling.number("attention_factor", scale, above=0.0)
    return RopeSpec(kind=kind, theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, **values)


def _yarn_attention_scaling(scaling: Fields, factor: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4: 0.1 ln(s) + 1, or the ratio of two of them where mscale is given."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.has("attention_factor"):
        return scaling.number("attention_factor", above=0.0)
    mscale = scaling.number("mscale", 0.0, minimum=0.0)
    mscale_all_dim = scaling.number("mscale_all_dim", 0.0, minimum=0.0)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
