"""What families read alike: sizes, windows, activations, experts, and the layers and the model made of them.

A family's file has `read_spec(fields) -> ModelSpec` and DEFAULTS, what an absent field means in its class of
transformers. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, Mixer, NormSpec, RopeSpec
from engine.models.spec import DTYPES, Dense, FeedForward, GatedActivation, LayerSpec, ModelSpec, PlainActivation, share

MAX_CONTEXT = 100_000_000

# Where Llama and most others have their norms: before attention and feed-forward.
LLAMA_NORMS = ("input_layernorm", None, "post_attention_layernorm", None)

# Other words for dtypes; the first is as good as none.
_DTYPES = {"auto": "bfloat16", "half": "float16", "float": "float32"} | {f"torch.{name}": name for name in DTYPES}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that every family reads alike, and what is made of them.

    common: fields of ModelSpec. norms: fields of NormSpec, of all norms.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    norms: dict[str, Any]
    common: dict[str, Any]

    def norm(self, name: str) -> NormSpec:
        return NormSpec(name, **self.norms)

    def attention(self, rope: RopeSpec | None, **given: Any) -> GroupedQueryAttention:
        """given: fields of GroupedQueryAttention; the scale is 1 / sqrt(head_dim) unless it is among them."""
        sizes = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        return GroupedQueryAttention(**{**sizes, "scale": self.head_dim**-0.5, "rope": rope, **given})

    def qk_norms(self) -> dict[str, NormSpec]:
        """Fields of GroupedQueryAttention."""
        return {"q_norm": self.norm("self_attn.q_norm"), "k_norm": self.norm("self_attn.k_norm")}

    def layer(
        self, mixer: Mixer, feed_forward: FeedForward, norms: tuple[str | None, ...] = LLAMA_NORMS, **given: Any
    ) -> LayerSpec:
        """norms: names of those before and after the mixer, before and after the feed-forward. given: other fields."""
        names = ("mixer_norm", "mixer_out_norm", "feed_forward_norm", "feed_forward_out_norm")
        given |= {field: self.norm(name) for field, name in zip(names, norms, strict=True) if name}
        return LayerSpec(mixer, feed_forward, **given)

    def model(self, layers: Iterable[LayerSpec], **given: Any) -> ModelSpec:
        """given: fields of ModelSpec."""
        return ModelSpec(**{**self.common, "layers": share(layers), "final_norm": self.norm("norm"), **given})


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


def read_shape(fields: Fields, *, eps: str = "rms_norm_eps", **norms: Any) -> Shape:
    """Read and check what all families have in common.

    eps: the field of the norms' epsilon. norms: other fields of NormSpec. Raises StartupError.

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
    given = fields.raw(dtype_field) if fields.has(dtype_field) else None
    spelled = _DTYPES.get(given) if isinstance(given, str) else None
    dtype = spelled or fields.choice(dtype_field, DTYPES, "bfloat16")
    eos_token_ids = fields.token_ids("eos_token_id")
    bos_token_ids = fields.token_ids("bos_token_id")
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": dtype,
        "eos_token_ids": eos_token_ids,
        "bos_token_id": bos_token_ids[0] if bos_token_ids else None,
        "class_eos_token_ids": () if fields.mentions("eos_token_id") else fields.default_token_ids("eos_token_id"),
        "assumed": tuple(name for name in _SIZES if name in fields.assumed),
    }
    return Shape(
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        hidden_size,
        intermediate_size,
        max_position_embeddings,
        {"eps": fields.number(eps, minimum=0.0, maximum=1.0), **norms},
        common,
    )


def read_activation(fields: Fields, name: str, renamed: Mapping[str, GatedActivation] | None = None) -> GatedActivation:
    """`hidden_act` of config.json, or the field that a family has in its place. renamed: other words for known ones."""
    known: dict[str, GatedActivation] = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        **(renamed or {}),
    }
    return known[fields.choice(name, known)]


def read_plain_activation(fields: Fields, name: str) -> PlainActivation:
    """The same for an MLP without a gate."""
    known: dict[str, PlainActivation] = {
        "relu2": "relu2",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    }
    return known[fields.choice(name, known)]


def aliased(fields: Fields, name: str, alias: str) -> Fields:
    """The fields with `name` said, too, where the file has its alias in transformers alone."""
    return (
        fields.with_values({name: fields.raw(alias)})
        if fields.mentions(alias) and not fields.mentions(name)
        else fields
    )


def read_experts(fields: Fields, name: str, alias: str) -> tuple[int, int]:
    """The number of experts (the field `name`; transformers writes it as `alias`, too) and of those a token uses."""
    name = alias if fields.mentions(alias) and not fields.mentions(name) else name
    count = fields.integer(name, maximum=100_000)
    chosen = fields.integer("num_experts_per_tok")
    if chosen > count:
        fields.fail("num_experts_per_tok", f"({chosen}) must not exceed {name} ({count})")
    return count, chosen


def shared_experts(name: str, intermediate_size: int, activation: GatedActivation) -> Dense | None:
    """What all tokens go through beside their experts, under `mlp.NAME`; None where its size is 0."""
    gate_up = (f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj")
    if not intermediate_size:
        return None
    return Dense(intermediate_size, activation, gate_up=gate_up, down=f"mlp.{name}.down_proj")


def drafting_layers(fields: Fields, shape: Shape, *names: str) -> tuple[str, ...]:
    """ModelSpec.outside: the layers past the last that guess several tokens at once; their number is in `names`."""
    count = next((fields.integer(name, minimum=0, maximum=1000) for name in names if fields.has(name)), 0)
    return tuple(f"layers.{shape.num_layers + index}." for index in range(count))


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
