"""Which families there are, and which of them a directory's config.json is of.

A new model is one file in families/ with `read_spec(fields) -> ModelSpec` and the DEFAULTS of its class, one line in
FAMILIES and one in MODEL_TYPES. Called once at start by the composition root. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from pathlib import Path
from typing import NoReturn

from engine.config import StartupError
from engine.models.families.gpt_oss import is_mxfp4
from engine.models.families.wrappers import OUTSIDE, TEXT_TYPES, WRAPPERS, Wrapper, text_fields
from engine.models.fields import Fields, show
from engine.models.gguf.config import as_stored, model_fields
from engine.models.gguf.reader import is_gguf, open_gguf
from engine.models.spec import Float8, ModelSpec

# `architectures` of config.json -> the module in families/ that reads it.
FAMILIES = {
    "ApertusForCausalLM": "apertus",
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Exaone4ForCausalLM": "exaone4",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3nForCausalLM": "gemma3n",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4UnifiedForCausalLM": "gemma4_unified",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "GlmForCausalLM": "glm",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granite_moe",
    "GraniteMoeHybridForCausalLM": "granite_hybrid",
    "HYV3ForCausalLM": "hy_v3",
    "HunYuanDenseV1ForCausalLM": "hunyuan_dense",
    "HunYuanMoEV1ForCausalLM": "hunyuan_moe",
    "Llama4ForCausalLM": "llama4",
    "LlamaForCausalLM": "llama",
    "MiniCPM3ForCausalLM": "minicpm3",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Ministral3ForCausalLM": "ministral3",
    "MinistralForCausalLM": "mistral",
    "Mistral4ForCausalLM": "mistral4",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "Starcoder2ForCausalLM": "starcoder2",
    "YoutuForCausalLM": "youtu",
}

# `model_type` of config.json -> the class, as transformers' AutoModelForCausalLM has it.
MODEL_TYPES = {
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "youtu": "YoutuForCausalLM",
}

# Rows or columns of a float8 matrix that share a scale, at most.
MAX_BLOCK = 65536
# How the names of classes for images and text end.
WRAPPED = "ForConditionalGeneration"

logger = logging.getLogger("oneloop.start")


def read_spec(directory: Path) -> ModelSpec:
    """What `directory/config.json` describes, read by the family of its class; or a GGUF file. Raises StartupError.

    Qwen3Model is a Qwen3ForCausalLM without its output layer.
    """
    if is_gguf(directory):
        return as_stored(_read(model_fields(directory)), open_gguf(directory))
    path = directory / "config.json"
    # pathlib raises where a name is too long or a directory may not be looked into.
    if not os.path.exists(path) and os.path.exists(directory / "adapter_config.json"):
        raise StartupError(f"{directory}: is an adapter, which must be merged into its base model first")
    return _read(Fields.read(path))


def differing_field(first: Path, second: Path) -> str | None:
    """The field of config.json that makes the model of `second` another than that of `first`, if one alone does."""
    ours, theirs = model_fields(first), model_fields(second)
    spec = _read(ours)
    for name in ours.differing(theirs):
        try:
            other = _read(ours.taking(name, theirs))
        except StartupError:
            return name
        if dataclasses.replace(other, assumed=spec.assumed) != spec:
            return name
    return None


def _read(fields: Fields) -> ModelSpec:
    """What config.json describes, read by the family of its class."""
    _refuse_unknown(fields)
    if (wrapper := _wrapper_of(fields)) is not None:
        return _read_text_part(fields, wrapper)
    architecture = _architecture_of(fields)
    spec = _read_family(FAMILIES[_with_head(architecture)], fields)
    headless = architecture.endswith("Model")
    return dataclasses.replace(spec, architecture=architecture, headless=headless, float8=_float8_of(fields))


def _read_family(name: str, fields: Fields) -> ModelSpec:
    family = importlib.import_module(f"engine.models.families.{name}")
    spec = family.read_spec(fields.over(family.DEFAULTS))
    assert isinstance(spec, ModelSpec)
    return spec


def _wrapper_of(fields: Fields) -> Wrapper | None:
    """By `model_type`, which must not contradict `architectures`; by `architectures` where the type is not known."""
    kind, given = fields.raw("model_type"), fields.raw("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    if wrapper is not None:
        fits = not names or any(name.endswith(WRAPPED) or name == f"{wrapper.name}Model" for name in names)
        return wrapper if fits else None
    if isinstance(kind, str) and kind in MODEL_TYPES:
        return None
    return next((each for each in WRAPPERS.values() if each.name + WRAPPED in names), None)


def _read_text_part(fields: Fields, wrapper: Wrapper) -> ModelSpec:
    """Tied where the file says so in either place, or the class does and it says nothing."""
    text, kind = text_fields(fields, wrapper)
    _refuse_unknown(text)
    module = TEXT_TYPES.get(kind) or FAMILIES.get(MODEL_TYPES.get(kind, ""))
    if module is None:
        known = ", ".join(sorted(MODEL_TYPES))
        text.fail("model_type", f"({show(kind)}) is not supported as the text part; supported are: {known}")
    spec = _read_family(module, text)
    assumed = spec.assumed
    if not fields.mentions("tie_word_embeddings"):
        assumed += ("tie_word_embeddings",)
    return dataclasses.replace(
        spec,
        architecture=wrapper.name + WRAPPED,
        headless=fields.raw("architectures") == [f"{wrapper.name}Model"],
        tie_word_embeddings=fields.flag("tie_word_embeddings", wrapper.ties) or spec.tie_word_embeddings,
        assumed=assumed,
        outside=spec.outside + OUTSIDE,
        text_only=True,
        float8=_float8_of(fields) or _float8_of(text),
    )


def _with_head(architecture: str) -> str:
    """LlamaModel -> LlamaForCausalLM."""
    return architecture.removesuffix("Model") + "ForCausalLM" if architecture.endswith("Model") else architecture


def _architecture_of(fields: Fields) -> str:
    """The class, as transformers finds it: `model_type` says which; `architectures` where there is no known type.

    A `...Model` in `architectures` is the class without its output layer. Raises StartupError.
    """
    given, kind = fields.raw("architectures"), fields.raw("model_type")
    names: list[str] = [] if given is None else given  # checked below
    if not isinstance(given, list | None) or any(not isinstance(name, str) for name in names):
        fields.fail("architectures", f"must be a list with the name of the model class, not {show(given)}")
    if kind is not None and not isinstance(kind, str):
        fields.fail("model_type", f"must be text, not {show(kind)}")
    known = [name for name in names if _with_head(name) in FAMILIES]
    by_type = MODEL_TYPES.get(kind or "")
    if by_type is None:
        if known:
            return known[0]
        if not names and kind is None:
            fields.fail("architectures", "and model_type are missing: one of them must name the model's class")
        _refuse(fields, names[0] if names else str(kind))
    for name in (by_type, by_type.removesuffix("ForCausalLM") + "Model"):
        if name in names:
            return name
    if names and not known and not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        _refuse(fields, names[0])
    if names:
        logger.warning(
            "%s: architectures says %s, but model_type %s is a %s and counts, as in transformers",
            fields.path,
            show(names[0]),
            show(kind),
            by_type,
        )
    return by_type


def _refuse(fields: Fields, name: str) -> NoReturn:
    """The sentence for a class that is not served."""
    field = "architectures" if fields.has("architectures") else "model_type"
    known = sorted([*FAMILIES, *(wrapper.name + WRAPPED for wrapper in WRAPPERS.values())])
    fields.fail(field, f"{name[:100]} is not supported; supported are: {', '.join(known)}")


def _float8_of(fields: Fields) -> Float8 | None:
    """How a checkpoint of matrices in float8 has its scales; None where it is none. Raises StartupError."""
    given = fields.raw("quantization_config")
    if not isinstance(given, dict) or given.get("quant_method") != "fp8":
        return None
    scheme = fields.nested("quantization_config")
    assert scheme is not None
    if scheme.raw("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        scheme.fail("fmt", f"must be e4m3, not {show(scheme.raw('fmt'))}")
    if scheme.has("expert_dtype") and scheme.raw("expert_dtype") != "fp8":
        scheme.fail("expert_dtype", f"({show(scheme.raw('expert_dtype'))}) is not supported")
    if not scheme.has("weight_block_size"):
        return Float8(None)
    block = scheme.integers("weight_block_size")
    if len(block) != 2 or not all(1 <= size <= MAX_BLOCK for size in block):
        scheme.fail("weight_block_size", f"must be two integers from 1 to {MAX_BLOCK}, not {show(list(block))}")
    return Float8((block[0], block[1]))


def _refuse_unknown(fields: Fields) -> None:
    """Refuse what changes the answer of any family and is not done here."""
    for name in ("quantization_config", "compression_config"):
        read = name == "quantization_config" and (_float8_of(fields) is not None or is_mxfp4(fields))
        if fields.has(name) and not read:
            scheme = fields.raw(name)
            if isinstance(scheme, dict):
                parts = (scheme.get("quant_method"), scheme.get("quant_algo"), scheme.get("format"))
                scheme = ", ".join(str(part)[:40] for part in parts if part) or "unknown"
            fields.fail(name, f"({show(scheme)}) is not supported; use an unquantized checkpoint")
    # In transformers null is as good as false here.
    if fields.mentions("is_causal") and not fields.raw("is_causal"):
        shown = show(fields.raw("is_causal"))
        fields.fail("is_causal", f"is {shown}: attention to later tokens (bidirectional) is not supported")
    # Of Gemma 4, which reads both: among parts of an image tokens may look ahead, and there are none.
    names = str(fields.raw("architectures"))
    gemma4 = str(fields.raw("model_type")).startswith("gemma4") or "Gemma4" in names
    if fields.raw("use_bidirectional_attention") and not gemma4:
        fields.fail("use_bidirectional_attention", "is not supported")
    if fields.raw("per_layer_config") and not gemma4:
        fields.fail("per_layer_config", "is not supported: layers of different sizes")
