"""Which families there are, and which of them a directory's config.json is of.

A new model is one file in families/ with `read_spec(fields) -> ModelSpec` and the DEFAULTS of its class, one line in
FAMILIES and one in MODEL_TYPES. Called once at start by the composition root. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path
from typing import NoReturn

from engine.config import StartupError
from engine.models.fields import Fields, show
from engine.models.spec import ModelSpec

# `architectures` of config.json -> the module in families/ that reads it.
FAMILIES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Glm4ForCausalLM": "glm4",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# `model_type` of config.json -> the class, as transformers' AutoModelForCausalLM has it.
MODEL_TYPES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Types of classes for images and text -> what their text part is, where `text_config` has no type of its own.
_TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "smolvlm": "llama",
}

logger = logging.getLogger("oneloop.start")


def read_spec(directory: Path) -> ModelSpec:
    """What `directory/config.json` describes, read by the family of its class. Raises StartupError.

    Qwen3Model is a Qwen3ForCausalLM without its output layer.
    """
    path = directory / "config.json"
    if not path.exists() and (directory / "adapter_config.json").exists():
        raise StartupError(f"{directory}: is an adapter, which must be merged into its base model first")
    fields = Fields.read(path)
    architecture = _architecture_of(fields)
    _refuse_unknown(fields)
    family = importlib.import_module(f"engine.models.families.{FAMILIES[_with_head(architecture)]}")
    spec = family.read_spec(fields.over(family.DEFAULTS))
    assert isinstance(spec, ModelSpec)
    return dataclasses.replace(spec, architecture=architecture, headless=architecture.endswith("Model"))


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
    """The sentence for a class that is not served; it names the class of a text part that would be."""
    text = fields.raw("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    outer = _TEXT_PARTS.get(str(fields.raw("model_type")))
    part = MODEL_TYPES.get(_TEXT_PARTS.get(str(inner), str(inner))) or MODEL_TYPES.get(str(outer))
    told = f"{name[:100]} is not supported; "
    if part is not None:
        told += f"its text part is a {part}, which is served from a directory of that class alone; "
    field = "architectures" if fields.has("architectures") else "model_type"
    fields.fail(field, f"{told}supported are: {', '.join(sorted(FAMILIES))}")


def _refuse_unknown(fields: Fields) -> None:
    """Refuse what changes the answer of any family and is not done here."""
    for name in ("quantization_config", "compression_config"):
        if fields.has(name):
            scheme = fields.raw(name)
            if isinstance(scheme, dict):
                parts = (scheme.get("quant_method"), scheme.get("quant_algo"), scheme.get("format"))
                scheme = ", ".join(str(part)[:40] for part in parts if part) or "unknown"
            fields.fail(name, f"({show(scheme)}) is not supported; use an unquantized checkpoint")
    # In transformers null is as good as false here.
    if fields.mentions("is_causal") and not fields.raw("is_causal"):
        shown = show(fields.raw("is_causal"))
        fields.fail("is_causal", f"is {shown}: attention to later tokens (bidirectional) is not supported")
    if fields.raw("use_bidirectional_attention"):
        fields.fail("use_bidirectional_attention", "is not supported")
    if fields.raw("per_layer_config"):
        fields.fail("per_layer_config", "is not supported: layers of different sizes")
