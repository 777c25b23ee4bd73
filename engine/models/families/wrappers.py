"""Models for images and text whose text part is a family of its own, under `text_config`: only that part is read.

A new one is a line in WRAPPERS. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.models.fields import Fields

# The tensors of what sees, hears and connects, and heads that draft; a `model.` may stand before any of them.
OUTSIDE = (
    "audio_tower.",
    "connector.",
    "embed_audio.",
    "embed_vision.",
    "image_newline",
    "mm_projector.",
    "mtp.",
    "multi_modal_projector.",
    "vision_adapter.",
    "vision_embedder.",
    "vision_model.",
    "vision_projection.",
    "vision_tower.",
    "visual.",
)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """name: the class, without ForConditionalGeneration. text: `model_type` of a text_config that names none.

    absent: fields of the text part where there is no text_config at all. flat: they then stand beside the others.
    ties: what an absent tie_word_embeddings means.
    """

    name: str
    text: str
    absent: dict[str, Any] = field(default_factory=dict)
    flat: bool = False
    ties: bool = False


_MISTRAL_SMALL = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e9,
    "sliding_window": None,
}
# `model_type` of config.json -> what it is.
WRAPPERS = {
    "aya_vision": Wrapper("AyaVision", "cohere2", ties=True),
    "cohere2_vision": Wrapper("Cohere2Vision", "cohere2", ties=True),
    "exaone4_5": Wrapper("Exaone4_5_", "exaone4"),
    "gemma3": Wrapper("Gemma3", "gemma3_text", ties=True),
    "gemma3n": Wrapper("Gemma3n", "gemma3n_text", ties=True),
    "gemma4": Wrapper("Gemma4", "gemma4_text", ties=True),
    "gemma4_unified": Wrapper("Gemma4Unified", "gemma4_unified_text", ties=True),
    "glm46v": Wrapper("Glm46V", "glm4v_text"),
    "glm4v": Wrapper("Glm4v", "glm4v_text"),
    "glm4v_moe": Wrapper("Glm4vMoe", "glm4v_moe_text"),
    "idefics3": Wrapper("Idefics3", "llama", {"rms_norm_eps": 1e-05}),
    "internvl": Wrapper("InternVL", "qwen2", ties=True),
    "lfm2_vl": Wrapper("Lfm2Vl", "lfm2", ties=True),
    "llama4": Wrapper("Llama4", "llama4_text"),
    "llava": Wrapper("Llava", "llama"),
    "llava_next": Wrapper("LlavaNext", "llama"),
    "llava_onevision": Wrapper("LlavaOnevision", "qwen2"),
    "mistral3": Wrapper("Mistral3", "mistral", _MISTRAL_SMALL, ties=True),
    "muse_glimmer": Wrapper("MuseGlimmer", "muse_glimmer_text"),
    "qwen2_5_vl": Wrapper("Qwen2_5_VL", "qwen2_5_vl_text", flat=True),
    "qwen2_vl": Wrapper("Qwen2VL", "qwen2_vl_text", flat=True),
    "qwen3_5": Wrapper("Qwen3_5", "qwen3_5_text"),
    "qwen3_5_moe": Wrapper("Qwen3_5Moe", "qwen3_5_moe_text"),
    "qwen3_vl": Wrapper("Qwen3VL", "qwen3_vl_text"),
    "qwen3_vl_moe": Wrapper("Qwen3VLMoe", "qwen3_vl_moe_text"),
    "smolvlm": Wrapper("SmolVLM", "llama", {"rms_norm_eps": 1e-05}),
    "vipllava": Wrapper("VipLlava", "llama"),
}
# `model_type` of a text part that is no class for text alone -> the module in families/ that reads it.
TEXT_TYPES = {
    "exaone4_5_text": "exaone4",
    "glm4v_moe_text": "glm4v_moe",
    "glm4v_text": "glm4v",
    "muse_glimmer_text": "muse_glimmer",
    "qwen2_5_vl": "qwen2_vl",
    "qwen2_5_vl_text": "qwen2_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen2_vl_text": "qwen2_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "qwen3_vl_text": "qwen3_vl",
}
# What may stand outside of text_config alone.
_COMMON = ("bos_token_id", "dtype", "eos_token_id", "torch_dtype")


def text_fields(fields: Fields, wrapper: Wrapper) -> tuple[Fields, str]:
    """The fields of the text part, and its `model_type`. Raises StartupError."""
    text = fields.nested("text_config")
    if text is None and wrapper.flat:
        return fields, wrapper.text
    if text is None:
        text = fields.empty("text_config", wrapper.absent)
    kind = text.raw("model_type")
    if kind is not None and not isinstance(kind, str):
        text.fail("model_type", "must be text")
    own = ("dtype", "torch_dtype") if text.has("dtype") or text.has("torch_dtype") else ()
    return text.over_values(fields.only(name for name in _COMMON if name not in own)), kind or wrapper.text
