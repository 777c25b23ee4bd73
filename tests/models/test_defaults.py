"""What an absent field means: every family's defaults against its class in transformers, and what names the class."""

from __future__ import annotations

import importlib
import json
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from engine.groups import Chunk
from engine.models.mixers import RopeSpec
from engine.models.registry import FAMILIES, MODEL_TYPES, read_spec
from engine.models.spec import Dense, ModelSpec, Ungated
from tests.models.support import compare, edit_json, make_checkpoint

TYPES = {name: kind for kind, name in MODEL_TYPES.items()}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon")
ROPE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")


def config_of(architecture: str, values: dict[str, Any]) -> Any:
    """transformers' config object, read as from a file."""
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[TYPES[architecture]].from_dict(dict(values))
    # Sizes that differ by layer are read as they stand in the file.
    config.allow_global_per_layer_attribute_access = True
    return config


def read(directory: Path, values: dict[str, Any]) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(values))
    return read_spec(directory)


def wide_rope(spec: ModelSpec) -> RopeSpec:
    """That of the layers that see all, or of all layers."""
    [rope] = {mixer.rope for mixer in spec.paged if mixer.window is None} - {None} or set(spec.ropes)
    assert rope is not None
    return rope


def local_rope(spec: ModelSpec) -> RopeSpec:
    [rope] = {mixer.rope for mixer in spec.paged if mixer.window is not None}
    assert rope is not None
    return rope


def defaults_of(architecture: str) -> dict[str, Any]:
    return importlib.import_module(f"engine.models.families.{FAMILIES[architecture]}").DEFAULTS


def theirs(config: Any, name: str) -> Any:
    rope = getattr(config, "rope_parameters", None)
    if name == "rope_local_base_freq":
        return rope["sliding_attention"]["rope_theta"]
    if name in ROPE:
        return rope.get("full_attention", rope)[name]
    if name == "intermediate_size" and isinstance(config.intermediate_size, list):
        [size] = set(config.intermediate_size)
        return size
    if name == "sliding_window_pattern":
        return config.layer_types.index("full_attention") + 1
    if name == "moe_layer_end_index":
        return -1 if config.moe_layer_end_index == config.num_hidden_layers - 1 else config.moe_layer_end_index
    if name == "sliding_window" and not config.sliding_window:
        # Hidden where use_sliding_window is false.
        return type(config)(use_sliding_window=True).sliding_window
    return getattr(config, name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_the_class(architecture: str) -> None:
    config = config_of(architecture, {})
    ours = defaults_of(architecture)
    assert ours == {name: theirs(config, name) for name in ours}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_of_the_class_that_counts_has_its_default(architecture: str) -> None:
    """Nothing is left to a default of our own."""
    config, ours = config_of(architecture, {}), defaults_of(architecture)
    counts = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "num_key_value_heads", "head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "norm_topk_prob",
        "max_window_layers", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
        "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
        "original_max_position_embeddings", "eos_token_id", "attention_out_bias", "use_bias", "layer_norm_eps",
        "norm_eps", "norm_epsilon", "logit_scale", "embedding_multiplier", "logits_scaling", "residual_multiplier",
        "attention_multiplier", "no_rope_layer_interval",
    }  # fmt: skip
    fields = type(config).__dataclass_fields__
    told = {name for name in counts & set(fields) if fields[name].default is not None}
    if architecture == "Glm4ForCausalLM":
        told |= {"eos_token_id"}
    assert told <= set(ours)
    # The others have no rope, or a base for each type of layer.
    others = {f"{name}ForCausalLM" for name in ("Laguna", "Mellum", "MiMoV2Flash", "NemotronH")}
    assert ("rope_theta" in ours) == (architecture not in others)


# Their classes leave out sizes that a model must have, or have ones that do not fit each other.
INCOMPLETE = {
    *("DeepseekV2ForCausalLM", "Dots1ForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeHybridForCausalLM"),
    *("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "NemotronHForCausalLM"),
}


@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - INCOMPLETE))
def test_an_empty_config(architecture: str, tmp_path: Path) -> None:
    """The values that a model is made of, where the file names nothing but the type."""
    values = {"model_type": TYPES[architecture]}
    ours, config = read(tmp_path, values), config_of(architecture, values)
    heads, latent = config.num_attention_heads, getattr(config, "kv_lora_rank", None)
    kv_heads = 1 if latent else getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert ours.architecture == architecture
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads) == (
        config.vocab_size, config.hidden_size, config.num_hidden_layers, heads, kv_heads
    )  # fmt: skip
    assert ours.head_dim == (latent + config.qk_rope_head_dim if latent else head_dim)
    dense = [layer.feed_forward for layer in ours.layers if isinstance(layer.feed_forward, Dense | Ungated)]
    assert not dense or {each.intermediate_size for each in dense} <= {theirs(config, "intermediate_size")}
    assert ours.max_position_embeddings == config.max_position_embeddings
    # OLMo 1 has it in its code.
    epsilons = [getattr(config, name) for name in EPSILONS if getattr(config, name, None) is not None]
    assert ours.final_norm.eps == next(iter(epsilons), 1e-5)
    assert ours.tie_word_embeddings == config.tie_word_embeddings
    eos = config.eos_token_id
    assert (ours.eos_token_ids, ours.class_eos_token_ids) == (
        (), () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    )  # fmt: skip
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    assert wide_rope(ours).theta == rope["rope_theta"]
    if wide_rope(ours).kind != "proportional":
        assert wide_rope(ours).rotary_dim == int(head_dim * rope.get("partial_rotary_factor", 1.0))
    window = getattr(config, "sliding_window", None)
    if hasattr(config, "attention_chunk_size"):
        window = Chunk(config.attention_chunk_size)
    window = None if window is None or window >= config.max_position_embeddings else window
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    reading = {
        index for index, layer in enumerate(ours.layers) if layer.paged is not None and layer.paged.reads is not None
    }
    kinds = [kind for index, kind in enumerate(kinds) if kind != "linear_attention" and index not in reading]
    limited = ("sliding_attention", "chunked_attention")
    assert ours.windows == tuple(window if kind in limited else None for kind in kinds)
    assert {"hidden_size", "vocab_size", "num_hidden_layers"} <= set(ours.assumed)
    for experts in ours.experts:
        counts = [getattr(config, name) for name in ("num_local_experts", "num_experts") if hasattr(config, name)]
        assert experts.num_experts == counts[0]
        assert experts.num_experts_per_token == config.num_experts_per_tok


OPTIONAL = (
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act", "hidden_activation", "attention_bias",
    "norm_topk_prob", "sliding_window", "layer_types", "query_pre_attn_scalar", "dtype", "architectures",
    "use_sliding_window", "max_window_layers", "decoder_sparse_step", "mlp_only_layers", "attn_logit_softcapping",
    "final_logit_softcapping", "mlp_bias", "eos_token_id", "bos_token_id", "attention_out_bias", "use_bias",
    "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern", "layer_norm_eps", "norm_eps", "norm_epsilon",
    "logit_scale", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier",
)  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 16},
    "Gemma3": {"head_dim": 16, "num_hidden_layers": 7},
    "Glm4": {"head_dim": 16},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 5},
    "Qwen3Moe": {"num_experts": 9, "moe_intermediate_size": 24, "head_dim": 16},
    "Ernie4_5_Moe": {"moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 24},
    "Exaone4": {"num_hidden_layers": 5},
    "Ministral3": {"head_dim": 16},
    "MiniMaxM2": {"num_local_experts": 9, "head_dim": 16},
}
SPARSE = [*(f"{family}ForCausalLM" for family in EXTRA), "LlamaForCausalLM", "Cohere2ForCausalLM", "PhiForCausalLM"]


@pytest.mark.parametrize("architecture", SPARSE)
def test_a_sparse_config_gives_the_same_logits(architecture: str, tmp_path: Path) -> None:
    """The sizes alone, as sparse directories have them: everything else is the class's."""
    family = architecture.removesuffix("ForCausalLM")
    reference = make_checkpoint(tmp_path, family, **EXTRA.get(family, {}))
    path = tmp_path / "config.json"
    present = json.loads(path.read_text())
    edit_json(path, **{name: ... for name in OPTIONAL if name in present})
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)


@pytest.mark.parametrize("eps", ["Mixtral", "Phi3", "Olmo2", "Glm4"])
def test_epsilon(eps: str, tmp_path: Path) -> None:
    expected = {"Mixtral": 1e-5, "Phi3": 1e-5, "Olmo2": 1e-5, "Glm4": 1.5625e-7}[eps]
    config = read(tmp_path, {"architectures": [f"{eps}ForCausalLM"], "hidden_size": 4096})
    assert config.final_norm.eps == expected
    assert read(tmp_path, {"architectures": [f"{eps}ForCausalLM"], "rms_norm_eps": None}).final_norm.eps == expected


def test_the_sparse_text_part_of_gemma3_4b(tmp_path: Path) -> None:
    """The fields that its text_config has, under the text class."""
    values = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read(tmp_path, values)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.max_position_embeddings, config.attention.scale, config.tie_word_embeddings) == (
        131072,
        1 / 16,
        True,
    )
    rope, local = wide_rope(config), local_rope(config)
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 8.0, 1e6)
    assert (local.kind, local.theta) == ("default", 1e4)
    assert [index for index, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23, 29]


NULLS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "kv-heads": ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": None}, "num_kv_heads", 32),
    "kv-heads-absent": ({"architectures": ["MistralForCausalLM"]}, "num_kv_heads", 8),
    "head-dim": ({"architectures": ["LlamaForCausalLM"], "head_dim": None, "hidden_size": 64}, "head_dim", 2),
    "head-dim-class": ({"architectures": ["Qwen3ForCausalLM"], "head_dim": None, "hidden_size": 64}, "head_dim", 128),
    "eps": ({"architectures": ["Phi3ForCausalLM"], "rms_norm_eps": None}, "final_norm.eps", 1e-5),
    "tied": ({"architectures": ["Gemma2ForCausalLM"], "tie_word_embeddings": None}, "tie_word_embeddings", True),
    "bias": ({"architectures": ["Glm4ForCausalLM"], "attention_bias": None}, "attention.qkv_bias", True),
    "softcap": ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": None}, "logit_softcap", None),
    "softcap-absent": ({"architectures": ["Gemma2ForCausalLM"]}, "logit_softcap", 30.0),
    "window": ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, "longest_window", None),
    "window-absent": ({"architectures": ["MistralForCausalLM"]}, "longest_window", 4096),
    "eos": ({"architectures": ["LlamaForCausalLM"], "eos_token_id": None}, "class_eos_token_ids", ()),
    "eos-absent": ({"architectures": ["LlamaForCausalLM"]}, "class_eos_token_ids", (2,)),
    "qwen-window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": None},
        "windows",
        (None,) * 32,
    ),
}


@pytest.mark.parametrize("name", NULLS)
def test_null_and_absent(name: str, tmp_path: Path) -> None:
    values, attribute, expected = NULLS[name]
    assert attrgetter(attribute)(read(tmp_path, values)) == expected


ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "older": {"rope_theta": 5e5},
    "integer": {"rope_theta": 500000},
    "newer": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "null-scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "default-scaling": {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    "both-types": {"rope_theta": 5e5, "rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
    "theta-beside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "theta-twice": {"rope_theta": 7e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "scaling-over-parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "scaling-over-parameters-with-theta": {
        "rope_theta": 3e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "empty-scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": {}},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "Glm4ForCausalLM"])
def test_where_two_forms_of_rope_meet(architecture: str, name: str, tmp_path: Path) -> None:
    values = {"model_type": TYPES[architecture], **json.loads(json.dumps(ROPES[name]))}
    [ours] = read(tmp_path, values).ropes
    rope = config_of(architecture, values).rope_parameters
    assert (ours.kind, ours.theta, ours.factor) == (rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0))


GEMMA_ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "older": {"rope_theta": 5e5, "rope_local_base_freq": 3e4},
    "scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "half": {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
    "half-null": {"rope_parameters": {"full_attention": {"rope_theta": 2e6}, "sliding_attention": None}},
    "both": {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {"full_attention": {"rope_theta": 2e6}, "sliding_attention": {"rope_theta": 2e4}},
    },
}


@pytest.mark.parametrize("name", GEMMA_ROPES)
def test_rope_by_layer_type(name: str, tmp_path: Path) -> None:
    values = {"model_type": "gemma3_text", **json.loads(json.dumps(GEMMA_ROPES[name]))}
    config = read(tmp_path, values)
    rope = config_of("Gemma3ForCausalLM", values).rope_parameters
    for ours, theirs in ((wide_rope(config), rope["full_attention"]), (local_rope(config), rope["sliding_attention"])):
        assert (ours.kind, ours.theta, ours.factor) == (
            theirs["rope_type"], theirs["rope_theta"], theirs.get("factor", 1.0)
        )  # fmt: skip


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({"model_type": "qwen2"}, "Qwen2ForCausalLM"),
    "null": ({"architectures": None, "model_type": "gemma3_text"}, "Gemma3ForCausalLM"),
    "empty": ({"architectures": [], "model_type": "olmo2"}, "Olmo2ForCausalLM"),
    "unknown": ({"architectures": ["FineLlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
    "several": ({"architectures": ["Foo", "LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
    "several-untyped": ({"architectures": ["Foo", "LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "conflict": ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
    "unknown-type": ({"architectures": ["Qwen3ForCausalLM"], "model_type": "mine"}, "Qwen3ForCausalLM"),
    "no-type": ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
    "headless": ({"architectures": ["Qwen3Model"], "model_type": "qwen3"}, "Qwen3Model"),
    "both": ({"architectures": ["Qwen3Model", "Qwen3ForCausalLM"], "model_type": "qwen3"}, "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_names_the_class(name: str, tmp_path: Path) -> None:
    values, expected = CLASSES[name]
    assert read(tmp_path, values).architecture == expected


def test_a_class_by_its_type_loads(tmp_path: Path) -> None:
    """A conversion from GGUF has null in `architectures`."""
    reference = make_checkpoint(tmp_path, "Mixtral", num_local_experts=5)
    edit_json(tmp_path / "config.json", architectures=None)
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)
