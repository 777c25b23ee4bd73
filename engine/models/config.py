"""What a model is: config.json and generation_config.json as frozen dataclasses.

Read once at start by the composition root, then by models/, the executors and the server. A field that is absent has
its class's default in transformers, which each family's file lists. Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import StartupError
from engine.models.fields import Fields, show

DTYPES = ("bfloat16", "float16", "float32")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
MAX_CONTEXT = 100_000_000


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """A rotary embedding.

    kind: one of ROPE_KINDS. rotary_dim: how many leading dimensions of a head are turned (even).
    interleaved: the checkpoint pairs dimensions (2i, 2i+1) and not (i, i + rotary_dim/2).
    attention_scaling: factor on cos and sin (yarn, longrope).
    original_max_position: context of the pretraining, where the kind needs it.
    The remaining fields belong to single kinds and carry the names of config.json.
    """

    kind: str
    theta: float
    rotary_dim: int
    interleaved: bool = False
    attention_scaling: float = 1.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP.

    layers: one flag a layer, False where the layer has a plain MLP.
    normalize: the weights of a token's chosen experts are made to add up to 1.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalize: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Where a checkpoint keeps the tensors of a layer, relative to `model.layers.N.`; None: the layer has none.

    input_norm and mlp_norm stand before attention and MLP, the out norms after them and before the residual
    addition. A fused projection of the checkpoint is one name, separate ones are several (in the order
    q, k, v and gate, up). `{}` in the names of experts is the expert's number.
    """

    input_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model; families differ by these values alone.

    dtype: what config.json names, bfloat16 where it names none. eos_token_ids: of config.json; where it does not
    mention them, class_eos_token_ids are those of the class. assumed: sizes that config.json does not name.
    qk_norm: an RMS norm on q and k, per head or over all heads at once. norm_offset: norms multiply by
    (offset + weight). windows: one entry a layer; the tokens a query sees, itself included, or None for all.
    local_rope: the rope of the layers flagged in local_rope_layers, where they differ. attention_scale: on q @ k.
    attention_softcap, logit_softcap: c in c * tanh(x / c), or None. experts: None for a dense model.
    architecture: the class, as `architectures` names it. headless: there is no output layer, so hidden states are all
    it gives.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    attention_scale: float
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    local_rope: RopeConfig | None = None
    local_rope_layers: tuple[bool, ...] = ()
    experts: ExpertsConfig | None = None
    names: WeightNames = WeightNames()
    architecture: str = ""
    headless: bool = False
    class_eos_token_ids: tuple[int, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def longest_window(self) -> int | None:
        """Tokens that a query sees at most, itself included; None where some layer sees all."""
        return None if None in self.windows else max(window for window in self.windows if window is not None)

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `directory/config.json`. Raises StartupError."""
        from engine.models.registry import read_config

        path = directory / "config.json"
        # pathlib raises where a name is too long or a directory may not be looked into.
        if not os.path.exists(path) and os.path.exists(directory / "adapter_config.json"):
            raise StartupError(f"{directory}: is an adapter, which must be merged into its base model first")
        return read_config(Fields.read(path))

    @property
    def context_length(self) -> int:
        """Tokens of context the model is made for: yarn is the one kind whose field does not say it itself."""
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position * self.rope.factor))
        return self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Elements of all weight matrices; norms and biases, far below 1%, are left out."""
        hidden, heads = self.hidden_size, self.num_heads + self.num_kv_heads
        attention = 2 * heads * self.head_dim * hidden
        mlp = 3 * hidden * self.intermediate_size
        matrices = 1 if self.tie_word_embeddings or self.headless else 2
        total = self.vocab_size * hidden * matrices + self.num_layers * attention
        if self.experts is None:
            return total + self.num_layers * mlp
        expert = 3 * hidden * self.experts.intermediate_size
        sparse = sum(self.experts.layers)
        return total + (self.num_layers - sparse) * mlp + sparse * self.experts.num_experts * (expert + hidden)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The model's own sampling defaults; None where generation_config.json says nothing.

    As vLLM does, only these fields count and `do_sample` is ignored. top_k: 0 is off.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> GenerationDefaults:
        """Read `directory/generation_config.json`; a missing file means no defaults. Raises StartupError."""
        path = directory / "generation_config.json"
        if not path.exists():
            return cls()
        fields = Fields.read(path)
        top_k = fields.optional_integer("top_k", minimum=-1)
        return cls(
            temperature=fields.optional_number("temperature", minimum=0.0),
            top_p=fields.optional_number("top_p", above=0.0, maximum=1.0),
            top_k=None if top_k is None else max(top_k, 0),
            min_p=fields.optional_number("min_p", minimum=0.0, maximum=1.0),
            repetition_penalty=fields.optional_number("repetition_penalty", above=0.0),
            max_new_tokens=fields.optional_integer("max_new_tokens", minimum=1),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that every family reads alike; `common` is to be passed on to ModelConfig."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_position_embeddings: int
    common: dict[str, Any]


# Fields whose absence a tensor of another shape gives away.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read_shape(fields: Fields) -> Shape:
    """Read and check what all families have in common. Raises StartupError.

    head_dim is hidden_size / num_attention_heads where neither the file nor the class has one; as many key and value
    heads as others, where the file says null or neither says anything.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        default = "" if fields.mentions("num_key_value_heads") else ", the default of this class,"
        fields.fail("num_key_value_heads", f"({num_kv_heads}){default} must divide num_attention_heads ({num_heads})")
    if fields.has_any("head_dim"):
        head_dim = fields.integer("head_dim")
    elif hidden_size % num_heads:
        fields.fail("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden_size})")
    else:
        head_dim = hidden_size // num_heads
    vocab_size = fields.integer("vocab_size")
    max_position_embeddings = fields.integer("max_position_embeddings", maximum=MAX_CONTEXT)
    num_layers = fields.integer("num_hidden_layers", maximum=100_000)
    intermediate_size = fields.integer("intermediate_size")
    dtype_field = "dtype" if fields.has("dtype") else "torch_dtype"
    dtype = fields.choice(dtype_field, DTYPES, "bfloat16")
    eos_token_ids = fields.token_ids("eos_token_id")
    bos_token_ids = fields.token_ids("bos_token_id")
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": fields.number("rms_norm_eps", minimum=0.0, maximum=1.0),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": dtype,
        "eos_token_ids": eos_token_ids,
        "bos_token_id": bos_token_ids[0] if bos_token_ids else None,
        "class_eos_token_ids": () if fields.mentions("eos_token_id") else fields.default_token_ids("eos_token_id"),
        "assumed": tuple(name for name in _SIZES if name in fields.assumed),
    }
    return Shape(num_layers, num_heads, num_kv_heads, head_dim, hidden_size, max_position_embeddings, common)


def read_activation(fields: Fields, name: str) -> Literal["silu", "gelu_tanh"]:
    """`hidden_act` of config.json as ModelConfig.activation."""
    known: dict[str, Literal["silu", "gelu_tanh"]] = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
    }
    return known[fields.choice(name, known)]


def read_experts(fields: Fields, name: str, alias: str) -> tuple[int, int]:
    """The number of experts (the field `name`; transformers writes it as `alias`, too) and of those a token uses."""
    name = alias if fields.mentions(alias) and not fields.mentions(name) else name
    count = fields.integer(name, maximum=100_000)
    chosen = fields.integer("num_experts_per_tok")
    if chosen > count:
        fields.fail("num_experts_per_tok", f"({chosen}) must not exceed {name} ({count})")
    return count, chosen


def read_windows(fields: Fields, shape: Shape, layer_types: tuple[str, ...]) -> tuple[int | None, ...]:
    """The window of every layer: `sliding_window` where the layer's type is sliding_attention; null is no window.

    A window as long as the context changes nothing and is left out.
    """
    window = fields.optional_integer("sliding_window")
    if window is None or "sliding_attention" not in layer_types:
        return (None,) * shape.num_layers
    if window >= shape.max_position_embeddings:
        return (None,) * shape.num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _rope_fields(fields: Fields, layer_type: str | None, scaled: bool) -> Fields:
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
) -> RopeConfig:
    """Read a rotary embedding in either form of config.json.

    The newer form is `rope_parameters`, flat or (layer_type) one object per layer type; the older one is `rope_theta`
    beside `rope_scaling`. theta_field, scaled: where the older form keeps the base, and whether `rope_scaling` applies
    (gemma's local rope differs in both). renamed: kinds that the family writes under another name. Raises
    StartupError.
    """
    scaling = _rope_fields(fields, layer_type, scaled)
    if scaling.has("rope_theta"):
        theta = scaling.number("rope_theta", above=0.0)
    else:
        theta = fields.number(theta_field, above=0.0)
    partial_fields = scaling if scaling.has("partial_rotary_factor") else fields
    partial = partial_fields.number("partial_rotary_factor", 1.0, above=0.0, maximum=1.0)
    rotary_dim = int(shape.head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        fields.fail("head_dim", f"({shape.head_dim}) leaves {rotary_dim} rotary dimensions; they must be even")

    kind_field = "rope_type" if scaling.has("rope_type") else "type"
    given = scaling.raw(kind_field)
    kind = (renamed or {}).get(given, given) if isinstance(given, str) else given
    if kind is None:
        kind = "default"
    if kind not in ROPE_KINDS:
        scaling.fail(kind_field, f"must be one of {', '.join(ROPE_KINDS)}, not {show(given)}")
    values: dict[str, Any] = {}
    if kind in ("linear", "dynamic", "llama3"):
        values["factor"] = scaling.number("factor", minimum=1.0)
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
    return RopeConfig(kind=kind, theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, **values)


def _yarn_attention_scaling(scaling: Fields, factor: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4: 0.1 ln(s) + 1, or the ratio of two of them where mscale is given."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.has("attention_factor"):
        return scaling.number("attention_factor", above=0.0)
    mscale = scaling.number("mscale", 0.0, minimum=0.0)
    mscale_all_dim = scaling.number("mscale_all_dim", 0.0, minimum=0.0)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
