"""From a GGUF file's metadata to the config.json that a family reads, and to the spec of its layers as they are stored.

ARCHITECTURES says for each `general.architecture` which class of transformers it is and what differs; the families
know nothing of it. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engine.models.fields import Fields
from engine.models.gguf.reader import GGUF, is_gguf, open_gguf
from engine.models.gguf.vocabulary import end_ids
from engine.models.mixers import GroupedQueryAttention, RopeSpec
from engine.models.spec import Dense, Experts, LayerSpec, ModelSpec, share

# Names for what a file has fused or apart, whatever the family's checkpoints do.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED_QKV = ("self_attn.qkv_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
FUSED_GATE_UP = ("mlp.gate_up_proj",)
EXPERT_GATE_UP = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
FUSED_EXPERT_GATE_UP = ("mlp.experts.{}.gate_up_proj",)

_MAX_ROPE_FACTORS = 4096


class _Keys:
    """The metadata of one architecture, by the rest of each key's name."""

    def __init__(self, model: GGUF, architecture: str) -> None:
        self.model = model
        self.prefix = f"{architecture}."
        self.layers = self.integer("block_count", minimum=1, maximum=100_000)
        # Layers past the last that draft several tokens at once.
        self.layers -= self.integer("nextn_predict_layers", 0, minimum=0, maximum=self.layers - 1)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.model

    def has_tensor(self, name: str, layer: int = 0) -> bool:
        return f"blk.{layer}.{name}" in self.model.tensors

    def _fields(self, name: str) -> Fields:
        """One value; an array with one number for every layer must hold the same everywhere. 0: a layer has none."""
        value = self.model.get(self.prefix + name)
        if isinstance(value, list) and value:
            numbers = [item for item in value[: self.layers] if item != 0] or [0]
            if any(item != numbers[0] for item in numbers):
                self.model.fail(self.prefix + name, "differs from layer to layer, which is not supported")
            value = numbers[0]
        return Fields(self.model.path, {name: value}, self.prefix)

    def integer(self, name: str, default: int | None = None, **bounds: int) -> int:
        if default is not None and not self.has(name):
            return default
        return self._fields(name).integer(name, **bounds)

    def number(self, name: str, default: float | None = None, **bounds: float) -> float:
        if default is not None and not self.has(name):
            return default
        return self._fields(name).number(name, **bounds)

    def flag(self, name: str, default: bool) -> bool:
        return self._fields(name).flag(name) if self.has(name) else default

    def fail(self, name: str, problem: str) -> NoReturn:
        self.model.fail(self.prefix + name, problem)

    def layer_types(self, period: int) -> list[str]:
        """Which layers have the window: `attention.sliding_window_pattern` or all but every `period`th."""
        name = "attention.sliding_window_pattern"
        given = self.model.get(self.prefix + name)
        if isinstance(given, list):
            if len(given) < self.layers or any(type(item) is not bool for item in given):
                self.fail(name, f"must hold true or false for each of {self.layers} layers")
            local = given[: self.layers]
        else:
            period = self.integer(name, period, minimum=1)
            local = [(layer + 1) % period != 0 for layer in range(self.layers)]
        return ["sliding_attention" if flag else "full_attention" for flag in local]


Config = dict[str, Any]


def _nothing(keys: _Keys, config: Config) -> Config:
    return {}


@dataclass(frozen=True, slots=True)
class Architecture:
    """model_type: of config.json. pairs: the rope turns dimensions (2i, 2i+1), to which llama.cpp permutes some
    families. shift: is added to the weights of norms there. more: fields of config.json beyond `_common`.
    """

    model_type: str
    pairs: bool = False
    shift: float = 0.0
    more: Callable[[_Keys, Config], Config] = _nothing


def _llama(keys: _Keys, config: Config) -> Config:
    if keys.has("expert_count") and keys.integer("expert_count", minimum=0):
        return {"model_type": "mixtral", "sliding_window": None}
    # Llama's own classes have either no bias or that of the output, too.
    if config["attention_bias"] and not config["attention_out_bias"]:
        return {"model_type": "seed_oss"}
    return {}


def _mistral3(keys: _Keys, config: Config) -> Config:
    rope = config["rope_parameters"]
    if keys.has("attention.temperature_scale"):
        rope = {**rope, "llama_4_scaling_beta": keys.number("attention.temperature_scale", minimum=0.0)}
    return {"rope_parameters": rope, "sliding_window": None}


def _granite(keys: _Keys, config: Config) -> Config:
    if not keys.flag("rope.scaling.finetuned", True):
        keys.fail("rope.scaling.finetuned", "(false: no rope) is not supported in this architecture")
    scale = keys.number("attention.scale", config["head_dim"] ** -0.5, above=0.0)
    return {
        "attention_multiplier": scale,
        "embedding_multiplier": keys.number("embedding_scale", 1.0, above=0.0),
        "residual_multiplier": keys.number("residual_scale", 1.0, above=0.0),
        "logits_scaling": keys.number("logit_scale", 1.0, above=0.0),
    }


def _cohere(keys: _Keys, config: Config) -> Config:
    norms = keys.has_tensor("attn_q_norm.weight")
    return {"logit_scale": keys.number("logit_scale", 1.0, above=0.0), "use_qk_norm": norms}


def _cohere2(keys: _Keys, config: Config) -> Config:
    window = keys.integer("attention.sliding_window")
    return {**_cohere(keys, config), "sliding_window": window, "layer_types": keys.layer_types(4)}


def _gemma_scalar(keys: _Keys, config: Config, large: int) -> float:
    """The largest model of a generation alone divides by the width of a head as its attention was planned."""
    planned = config["hidden_size"] // config["num_attention_heads"]
    return float(planned if keys.layers == large else config["head_dim"])


def _gemma(keys: _Keys, config: Config) -> Config:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(keys: _Keys, config: Config) -> Config:
    return {
        "query_pre_attn_scalar": _gemma_scalar(keys, config, 46),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": keys.layer_types(2),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0, above=0.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0, above=0.0),
    }


def _gemma3(keys: _Keys, config: Config) -> Config:
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    cap = keys.number("final_logit_softcapping", 0.0, minimum=0.0)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0, above=0.0)}
    return {
        "query_pre_attn_scalar": _gemma_scalar(keys, config, 62),
        "sliding_window": window or None,
        "layer_types": keys.layer_types(6) if window else ["full_attention"] * keys.layers,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": cap or None,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _olmo2(keys: _Keys, config: Config) -> Config:
    """OLMo 3 is an OLMo 2 with windows there."""
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    if not window:
        return {}
    theta = config["rope_parameters"]["rope_theta"]
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", theta, above=0.0)}
    return {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": keys.layer_types(4),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _exaone4(keys: _Keys, config: Config) -> Config:
    window = keys.integer("attention.sliding_window", 4096 if keys.layers == 64 else 0, minimum=0)
    types = keys.layer_types(4) if window else ["full_attention"] * keys.layers
    return {"sliding_window": window or None, "layer_types": types}


def _smollm3(keys: _Keys, config: Config) -> Config:
    return {"use_sliding_window": False, "no_rope_layer_interval": 4}


def _phi3(keys: _Keys, config: Config) -> Config:
    original = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    # There it stands beside the rope.
    return {"sliding_window": window or None, "original_max_position_embeddings": original}


def _no_window(keys: _Keys, config: Config) -> Config:
    return {"sliding_window": None, "use_sliding_window": False}


def _qwen2_moe(keys: _Keys, config: Config) -> Config:
    shared = keys.model.tensors.get("blk.0.ffn_up_shexp.weight")
    inner = shared.shape[0] if shared is not None and len(shared.shape) == 2 else 0
    return {
        **_no_window(keys, config),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": keys.integer("expert_shared_feed_forward_length", inner, minimum=0),
        "qkv_bias": config["attention_bias"],
    }


def _qwen3_moe(keys: _Keys, config: Config) -> Config:
    return {**_no_window(keys, config), "norm_topk_prob": True}


def _sigmoid(keys: _Keys, config: Config) -> Config:
    """Routers as DeepSeek V3 introduced them; 2 is the sigmoid."""
    if keys.integer("expert_gating_func", 2) != 2:
        keys.fail("expert_gating_func", "is not the sigmoid, which is what this architecture has")
    norms = keys.has_tensor("attn_q_norm.weight")
    return {"use_qk_norm": norms, "max_window_layers": keys.layers, "sliding_window": None}


def _hy_v3(keys: _Keys, config: Config) -> Config:
    return {
        **_sigmoid(keys, config),
        "num_shared_experts": int(keys.has_tensor("ffn_up_shexp.weight", keys.layers - 1)),
        "router_scaling_factor": keys.number("expert_weights_scale", 1.0, above=0.0),
        "mlp_layer_types": [
            "sparse" if keys.has_tensor("ffn_gate_inp.weight", layer) else "dense" for layer in range(keys.layers)
        ],
    }


def _minimax_m2(keys: _Keys, config: Config) -> Config:
    _sigmoid(keys, config)
    return {"intermediate_size": config["moe_intermediate_size"]}


def _hunyuan_moe(keys: _Keys, config: Config) -> Config:
    inner, shared = config["moe_intermediate_size"], keys.integer("expert_shared_feed_forward_length", 0, minimum=0)
    if shared and shared != inner:
        keys.fail("expert_shared_feed_forward_length", f"({shared}) must be that of the experts ({inner})")
    return {"intermediate_size": inner, "moe_topk": config["num_experts_per_tok"]}


def _ernie_moe(keys: _Keys, config: Config) -> Config:
    sparse = [layer for layer in range(keys.layers) if keys.has_tensor("ffn_gate_inp.weight", layer)]
    step = keys.integer("interleave_moe_layer_step", 1)
    shared = keys.model.tensors.get(f"blk.{sparse[0]}.ffn_up_shexp.weight") if sparse else None
    inner = config["moe_intermediate_size"]
    return {
        "moe_num_experts": config["num_experts"],
        "moe_k": config["num_experts_per_tok"],
        "moe_num_shared_experts": shared.shape[0] // inner if shared is not None else 0,
        "moe_layer_start_index": sparse[0] if sparse else 0,
        "moe_layer_end_index": sparse[-1] if sparse else -1,
        "moe_layer_interval": step,
    }


def _lfm2(keys: _Keys, config: Config) -> Config:
    """Layers without heads for keys are short convolutions."""
    name = "attention.head_count_kv"
    given = keys.model.get(keys.prefix + name)
    if not isinstance(given, list) or len(given) < keys.layers:
        keys.fail(name, f"must say for each of {keys.layers} layers how many heads it has")
    return {
        "layer_types": ["full_attention" if heads else "conv" for heads in given[: keys.layers]],
        "conv_L_cache": keys.integer("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
    }


def _qwen35(keys: _Keys, config: Config) -> Config:
    """Gated delta nets in all layers but some."""
    given = keys.model.get(f"{keys.prefix}attention.recurrent_layers")
    if isinstance(given, list):
        if len(given) < keys.layers or any(type(item) is not bool for item in given):
            keys.fail("attention.recurrent_layers", f"must hold true or false for each of {keys.layers} layers")
        recurrent = given[: keys.layers]
    else:
        interval = keys.integer("full_attention_interval", 4)
        recurrent = [(layer + 1) % interval != 0 for layer in range(keys.layers)]
    heads, inner = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if inner % heads:
        keys.fail("ssm.inner_size", f"({inner}) must be a multiple of ssm.time_step_rank ({heads})")
    attending = recurrent.index(False) if False in recurrent else 0
    shared = keys.model.tensors.get("blk.0.ffn_up_shexp.weight")
    return {
        "layer_types": ["linear_attention" if flag else "full_attention" for flag in recurrent],
        "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel"),
        "linear_key_head_dim": keys.integer("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_num_key_heads": keys.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "attention_bias": keys.has_tensor("attn_q.bias", attending),
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": shared.shape[0] if shared is not None and shared.shape else 0,
    }


# `general.architecture` -> what it is.
ARCHITECTURES = {
    "arcee": Architecture("arcee", pairs=True),
    "chatglm": Architecture("glm", pairs=True),
    "cohere2": Architecture("cohere2", pairs=True, more=_cohere2),
    "command-r": Architecture("cohere", pairs=True, more=_cohere),
    "dots1": Architecture("dots1", more=_sigmoid),
    "ernie4_5": Architecture("ernie4_5", pairs=True),
    "ernie4_5-moe": Architecture("ernie4_5_moe", pairs=True, more=_ernie_moe),
    "exaone4": Architecture("exaone4", more=_exaone4),
    "gemma": Architecture("gemma", shift=1.0, more=_gemma),
    "gemma2": Architecture("gemma2", shift=1.0, more=_gemma2),
    "gemma3": Architecture("gemma3_text", shift=1.0, more=_gemma3),
    "glm4": Architecture("glm4", pairs=True),
    "glm4moe": Architecture("glm4_moe", more=_sigmoid),
    "granite": Architecture("granite", pairs=True, more=_granite),
    "granitemoe": Architecture("granitemoe", pairs=True, more=_granite),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "hunyuan-moe": Architecture("hunyuan_v1_moe", more=_hunyuan_moe),
    "hy_v3": Architecture("hy_v3", more=_hy_v3),
    "lfm2": Architecture("lfm2", more=_lfm2),
    "llama": Architecture("llama", pairs=True, more=_llama),
    "minimax-m2": Architecture("minimax_m2", more=_minimax_m2),
    "mistral3": Architecture("ministral3", pairs=True, more=_mistral3),
    "nemotron": Architecture("nemotron", shift=1.0),
    "olmo2": Architecture("olmo2", more=_olmo2),
    "olmoe": Architecture("olmoe"),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", more=_phi3),
    "qwen2": Architecture("qwen2", more=_no_window),
    "qwen2moe": Architecture("qwen2_moe", more=_qwen2_moe),
    "qwen2vl": Architecture("qwen2", more=_no_window),
    "qwen3": Architecture("qwen3", more=_no_window),
    "qwen3moe": Architecture("qwen3_moe", more=_qwen3_moe),
    "qwen35": Architecture("qwen3_5_text", shift=1.0, more=_qwen35),
    "qwen35moe": Architecture("qwen3_5_moe_text", shift=1.0, more=_qwen35),
    "qwen3vl": Architecture("qwen3", more=_no_window),
    "qwen3vlmoe": Architecture("qwen3_moe", more=_qwen3_moe),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", pairs=True, more=_smollm3),
    "starcoder2": Architecture("starcoder2", more=_no_window),
}
# Made for images, too.
_TEXT_PARTS = ("qwen2vl", "qwen35", "qwen35moe", "qwen3vl", "qwen3vlmoe")


def model_fields(model: Path) -> Fields:
    """config.json of a directory, or what a GGUF file's metadata says in its place. Raises StartupError."""
    if not is_gguf(model):
        return Fields.read(model / "config.json")
    file = open_gguf(model)
    return Fields(file.path, read_config(file))


def architecture_of(model: GGUF) -> Architecture:
    """Raises StartupError for one that is not served."""
    name = model.text("general.architecture")
    if name is None:
        model.fail("general.architecture", "is missing")
    if name not in ARCHITECTURES:
        model.fail("general.architecture", f"{name!r:.80} is not supported; supported are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def read_config(model: GGUF) -> Config:
    """What config.json would say. Raises StartupError."""
    architecture = architecture_of(model)
    keys = _Keys(model, model.text("general.architecture") or "")
    config = _common(keys)
    return {**config, "model_type": architecture.model_type, **architecture.more(keys, config)}


def _common(keys: _Keys) -> Config:
    """Fields that families have in common, each under all of its names: they read those that they know."""
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    if (value_dim := keys.integer("attention.value_length", head_dim)) != head_dim:
        keys.fail("attention.value_length", f"({value_dim}) must be attention.key_length ({head_dim})")
    embedding = keys.model.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        keys.model.fail("token_embd.weight", "is missing, or is no matrix: that tensor is the embedding")
    rms = keys.has("attention.layer_norm_rms_epsilon")
    eps = keys.number(f"attention.layer_norm_{'rms_' if rms else ''}epsilon", minimum=0.0, maximum=1.0)
    qkv_bias = keys.has_tensor("attn_q.bias") or keys.has_tensor("attn_qkv.bias")
    output_bias, mlp_bias = keys.has_tensor("attn_output.bias"), keys.has_tensor("ffn_up.bias")
    config = {
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", 1),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.integer("context_length", maximum=100_000_000),
        "tie_word_embeddings": "output.weight" not in keys.model.tensors,
        "attention_bias": qkv_bias,
        "attention_out_bias": output_bias,
        "mlp_bias": mlp_bias,
        "use_bias": mlp_bias or output_bias,
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), eps),
        "rope_parameters": _rope(keys, head_dim),
        "bos_token_id": keys.model.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(end_ids(keys.model)),
    }
    return config | _experts(keys)


def _experts(keys: _Keys) -> Config:
    count = keys.integer("expert_count", 0, minimum=0, maximum=100_000)
    if not count:
        return {}
    inner = keys.integer("feed_forward_length", 1)
    return {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count),
        "num_experts_per_tok": keys.integer("expert_used_count", maximum=count),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", inner),
        "n_shared_experts": keys.integer("expert_shared_count", 0, minimum=0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0, minimum=0.0) or 1.0,
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0, minimum=0),
        "n_group": keys.integer("expert_group_count", 1),
        "topk_group": keys.integer("expert_group_used_count", 1),
    }


def _rope(keys: _Keys, head_dim: int) -> Config:
    """`rope_parameters`: the base, the share of a head, and the scaling that llama.cpp derives from the same keys."""
    turned = keys.integer("rope.dimension_count", head_dim, maximum=head_dim)
    rope: Config = {"rope_theta": keys.number("rope.freq_base", 10000.0, above=0.0)}
    if turned != head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    context = keys.integer("context_length", maximum=100_000_000)
    original = keys.integer("rope.scaling.original_context_length", context)
    attention = keys.number("rope.scaling.attn_factor", 1.0, above=0.0)
    short, long = _factors(keys, "rope_factors_short", turned), _factors(keys, "rope_factors_long", turned)
    every = _factors(keys, "rope_freqs", turned)
    if every is not None:
        short = long = every
    if short is not None and long is not None:
        # Of all kinds the one that divides frequencies by given numbers.
        return rope | {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": context if every is not None else original,
            "attention_factor": attention,
        }
    name = "rope.scaling.type"
    kind = keys.model.text(keys.prefix + name) or "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        keys.fail(name, f"must be one of none, linear, yarn, longrope, not {kind!r:.40}")
    if kind == "longrope":
        keys.fail(name, "is longrope, but the file has no rope_factors_short and rope_factors_long")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0, minimum=0.0), minimum=0.0)
    if kind == "none" or factor in (0.0, 1.0):
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if keys.has("rope.scaling.yarn_attn_factor"):
        attention *= keys.number("rope.scaling.yarn_attn_factor", above=0.0)
    else:
        weight = keys.number("rope.scaling.yarn_log_multiplier", 0.0, minimum=0.0)
        attention *= _mscale(factor, 1.0) / (_mscale(factor, weight) if weight else 1.0)
    return rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0, above=0.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0, above=0.0),
    }


def _mscale(factor: float, weight: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(keys: _Keys, name: str, turned: int) -> list[float] | None:
    """The numbers of a tensor by which frequencies are divided; None where there is none."""
    tensor = keys.model.tensors.get(f"{name}.weight") or keys.model.tensors.get(f"blk.0.{name}.weight")
    if tensor is None:
        return None
    if tensor.type != "F32" or tensor.shape != (turned // 2,) or turned // 2 > _MAX_ROPE_FACTORS:
        keys.model.fail(
            f"tensor {name}", f"must be {turned // 2} numbers of F32, not {list(tensor.shape)} of {tensor.type}"
        )
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        factors: list[float] = np.frombuffer(file.read(tensor.end - tensor.begin), dtype="<f4").tolist()
    if any(not math.isfinite(factor) or factor <= 0 for factor in factors):
        keys.model.fail(f"tensor {name}", "must hold numbers above 0")
    return factors


def as_stored(spec: ModelSpec, model: GGUF) -> ModelSpec:
    """The spec with ropes that turn what the file has, and with names for what it has fused or apart."""
    architecture = architecture_of(model)
    layers = [_layer_as_stored(layer, index, model, architecture.pairs) for index, layer in enumerate(spec.layers)]
    text_only = model.text("general.architecture") in _TEXT_PARTS
    return replace(spec, layers=share(layers), text_only=text_only)


def _layer_as_stored(layer: LayerSpec, index: int, model: GGUF, pairs: bool) -> LayerSpec:
    def has(name: str) -> bool:
        return f"blk.{index}.{name}.weight" in model.tensors

    mixer, feed_forward = layer.mixer, layer.feed_forward
    if isinstance(mixer, GroupedQueryAttention):
        rope: RopeSpec | None = None if mixer.rope is None else replace(mixer.rope, interleaved=pairs)
        mixer = replace(mixer, rope=rope, qkv=FUSED_QKV if has("attn_qkv") else QKV)
    if isinstance(feed_forward, Dense):
        feed_forward = replace(feed_forward, gate_up=GATE_UP if has("ffn_gate") else FUSED_GATE_UP)
    if isinstance(feed_forward, Experts):
        fused = has("ffn_gate_up_exps")
        feed_forward = replace(feed_forward, gate_up=FUSED_EXPERT_GATE_UP if fused else EXPERT_GATE_UP, stacked=None)
        if isinstance(shared := feed_forward.shared, Dense) and not has("ffn_gate_shexp"):
            feed_forward = replace(feed_forward, shared=replace(shared, gate_up=("mlp.shared.gate_up_proj",)))
    return replace(layer, mixer=mixer, feed_forward=feed_forward)
