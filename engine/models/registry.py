"""Which families there are, and which of them a directory's config.json is of.

A new model is one file in families/ with `read_spec(fields) -> ModelSpec` and the DEFAULTS of its class, one line in
FAMILIES and one in MODEL_TYPES (of an encoder: ENCODERS and ENCODER_TYPES). Called once at start by the composition
root. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from pathlib import Path
from typing import NoReturn

from engine.config import StartupError
from engine.models.families.classifiers import REWARD, TEXTS, TOKENS, read_classifier
from engine.models.families.encoders import both_ways
from engine.models.families.wrappers import OUTSIDE, TEXT_TYPES, WRAPPERS, Wrapper, text_fields
from engine.models.fields import Fields, show
from engine.models.gguf.config import as_stored, model_fields
from engine.models.gguf.reader import is_gguf, open_gguf
from engine.models.quantisation import quantisation_of
from engine.models.spec import ModelSpec

# `architectures` of config.json -> the module in families/ that reads it.
FAMILIES = {
    "AXK1ForCausalLM": "axk1",
    "AfmoeForCausalLM": "afmoe",
    "ApertusForCausalLM": "apertus",
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "Cohere2MoeForCausalLM": "cohere2_moe",
    "CohereForCausalLM": "cohere",
    "CwmForCausalLM": "cwm",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Exaone4ForCausalLM": "exaone4",
    "ExaoneMoeForCausalLM": "exaone_moe",
    "FalconH1ForCausalLM": "falcon_h1",
    "FlexOlmoForCausalLM": "flex_olmo",
    "GPTNeoXForCausalLM": "gpt_neox",
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
    "GraniteMoeSWAForCausalLM": "granite_moe_swa",
    "GraniteMoeSharedForCausalLM": "granite_moe_shared",
    "GraniteSWAForCausalLM": "granite_swa",
    "HYV3ForCausalLM": "hy_v3",
    "HeliumForCausalLM": "helium",
    "HunYuanDenseV1ForCausalLM": "hunyuan_dense",
    "HunYuanMoEV1ForCausalLM": "hunyuan_moe",
    "HyperCLOVAXForCausalLM": "hyperclovax",
    "IQuestCoderForCausalLM": "iquestcoder",
    "InternLM3ForCausalLM": "internlm3",
    "Jais2ForCausalLM": "jais2",
    "LagunaForCausalLM": "laguna",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "Llama4ForCausalLM": "llama4",
    "LlamaForCausalLM": "llama",
    "MellumForCausalLM": "mellum",
    "MiMoV2FlashForCausalLM": "mimo_v2_flash",
    "MiniCPM3ForCausalLM": "minicpm3",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Ministral3ForCausalLM": "ministral3",
    "MinistralForCausalLM": "mistral",
    "Mistral4ForCausalLM": "mistral4",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronForCausalLM": "nemotron",
    "NemotronHForCausalLM": "nemotron_h",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "OlmoForCausalLM": "olmo",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "PhimoeForCausalLM": "phimoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe",
    "SarvamMoEForCausalLM": "sarvam_moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "SolarOpenForCausalLM": "solar_open",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    "VaultGemmaForCausalLM": "vaultgemma",
    "YoutuForCausalLM": "youtu",
}

# The same for classes that transformers does not have; of some only the name is new.
OTHERS = {
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
    "LLaMAForCausalLM": "llama",
    "MiMoForCausalLM": "mimo",
    "MiniCPMForCausalLM": "minicpm",
    "TeleChat3ForCausalLM": "llama",
}
CLASSES = FAMILIES | OTHERS

# `model_type` of config.json -> the class, as transformers' AutoModelForCausalLM has it.
MODEL_TYPES = {
    "afmoe": "AfmoeForCausalLM",
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "cwm": "CwmForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
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
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granite_swa": "GraniteSWAForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoe_swa": "GraniteMoeSWAForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "helium": "HeliumForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "hyperclovax": "HyperCLOVAXForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "iquestcoder": "IQuestCoderForCausalLM",
    "jais2": "Jais2ForCausalLM",
    "laguna": "LagunaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mellum": "MellumForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "solar_open": "SolarOpenForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "youtu": "YoutuForCausalLM",
}

# The same for encoders, by the name of the class without what it is for.
ENCODERS = {
    "Bert": "bert",
    "Camembert": "roberta",
    "DistilBert": "distilbert",
    "EuroBert": "eurobert",
    "Gte": "gte",
    "ModernBert": "modernbert",
    "New": "gte",
    "NomicBert": "nomic_bert",
    "Roberta": "roberta",
    "XLMRoberta": "roberta",
}
ENCODER_TYPES = {
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "eurobert": "EuroBert",
    "gte": "Gte",
    "modernbert": "ModernBert",
    "new": "New",
    "nomic_bert": "NomicBert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
# What an encoder's class may be for: its heads for masked words and for spans are left out.
HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining", "ForQuestionAnswering")
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
    if (found := _encoder_of(fields)) is not None:
        stem, task = found
        spec = _read_family(ENCODERS[stem], fields)
    else:
        architecture = _architecture_of(fields)
        stem, task = _split(architecture)
        spec = _read_family(CLASSES[f"{stem}ForCausalLM"], fields)
        spec = dataclasses.replace(spec, headless=spec.headless or task != "ForCausalLM")
        spec = _as_encoder(fields, stem, spec)
    spec = dataclasses.replace(spec, architecture=stem + task, quantisation=quantisation_of(fields))
    if task not in (TEXTS, TOKENS, REWARD):
        return spec
    classifier = read_classifier(fields, stem, task, spec)
    used = tuple(step.name.removeprefix("model.") for step in classifier.steps)
    outside = tuple(name for name in spec.outside if not any(step.startswith(name) for step in used))
    return dataclasses.replace(spec, classifier=classifier, outside=outside)


def _encoder_of(fields: Fields) -> tuple[str, str] | None:
    """The class and what it is for: by `model_type`, else by `architectures`. None for any other class."""
    given, kind = fields.raw("architectures"), fields.raw("model_type")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    stem = ENCODER_TYPES.get(kind) if isinstance(kind, str) else None
    if stem is None and not (isinstance(kind, str) and kind in MODEL_TYPES):
        stem = next((stem for name in names if (stem := _split(name)[0]) in ENCODERS), None)
    if stem is None:
        return None
    task = _split(names[0])[1] if names else "Model"
    if task in HEADLESS:
        return stem, "Model"
    if task not in (TEXTS, TOKENS):
        known = ", ".join(stem + each for each in (*HEADLESS, TEXTS, TOKENS))
        fields.fail("architectures", f"{names[0][:100]} is not supported; supported are: {known}")
    return stem, task


def _split(architecture: str) -> tuple[str, str]:
    """LlamaForCausalLM -> Llama, ForCausalLM. LlamaModel -> Llama, Model. Gemma3TextModel is Gemma 3's."""
    for task in (REWARD, *HEADLESS, "ForCausalLM", TEXTS, TOKENS):  # a reward model is no Model
        if architecture.endswith(task):
            stem = architecture.removesuffix(task)
            return "Gemma3" if stem == "Gemma3Text" else stem, task
    return architecture, ""


def _as_encoder(fields: Fields, stem: str, spec: ModelSpec) -> ModelSpec:
    """The same, with attention to later tokens where the file says so: null is as good as false in transformers."""
    if fields.mentions("is_causal") and not fields.raw("is_causal"):
        return both_ways(fields, "is_causal", spec)
    if fields.raw("use_bidirectional_attention") and not _is_gemma4(fields):
        if stem != "Gemma3" or fields.raw("use_bidirectional_attention") is not True:
            fields.fail("use_bidirectional_attention", "is not supported")
        # The file's window is the width of both sides.
        longest = max((window for window in spec.windows if window is not None), default=None)
        return both_ways(fields, "use_bidirectional_attention", spec, None if longest is None else longest // 2 + 1)
    return spec


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
    if text.raw("use_bidirectional_attention") and not _is_gemma4(text):
        text.fail("use_bidirectional_attention", "is not supported in a text part")
    if text.mentions("is_causal") and not text.raw("is_causal"):
        text.fail("is_causal", "is not supported in a text part: attention to later tokens")
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
        quantisation=quantisation_of(fields) or quantisation_of(text),
    )


def _with_head(architecture: str) -> str:
    """LlamaModel -> LlamaForCausalLM, and so of the classes with other heads."""
    stem, task = _split(architecture)
    return f"{stem}ForCausalLM" if task in ("Model", TEXTS, TOKENS, REWARD) else architecture


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
    known = [name for name in names if _with_head(name) in CLASSES]
    by_type = MODEL_TYPES.get(kind or "")
    if by_type is None:
        if known:
            return known[0]
        if not names and kind is None:
            fields.fail("architectures", "and model_type are missing: one of them must name the model's class")
        _refuse(fields, names[0] if names else str(kind))
    if by_type in names:
        return by_type
    for name in names:
        if _with_head(name) == by_type:
            return name
    if names and not known and not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        if _split(names[0])[0] in ENCODERS:
            fields.fail("architectures", f"{names[0]} does not go with model_type {show(kind)}")
        _refuse(fields, names[0])
    if names:
        task = _split(names[0])[1]
        if task in (TEXTS, TOKENS, REWARD):
            by_type = _split(by_type)[0] + task
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
    encoders = (f"{stem}Model" for stem in ENCODERS)
    known = sorted([*CLASSES, *encoders, *(wrapper.name + WRAPPED for wrapper in WRAPPERS.values())])
    fields.fail(field, f"{name[:100]} is not supported; supported are: {', '.join(known)}")


def _refuse_unknown(fields: Fields) -> None:
    """Refuse what changes the answer of any family and is not done here."""
    quantisation_of(fields)
    if fields.raw("per_layer_config") and not _is_gemma4(fields):
        fields.fail("per_layer_config", "is not supported: layers of different sizes")


def _is_gemma4(fields: Fields) -> bool:
    """It reads `per_layer_config` itself, and among parts of an image alone its tokens look ahead."""
    return str(fields.raw("model_type")).startswith("gemma4") or "Gemma4" in str(fields.raw("architectures"))
