"""The text part of models for images and text, against transformers' whole class given text alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, StartupError
from engine.models.families.wrappers import WRAPPERS
from engine.models.registry import read_spec
from tests.models.support import SIZES, compare, edit_json, fill, load, make_checkpoint
from tests.models.test_families import DELTA, GEMMA3N, GEMMA4, QWEN_NEXT_EXPERTS, SIGMOID

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 48}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}
MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]}
MROPE_INTERLEAVED = {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 16}

# Class without its ending -> text fields, fields of the tower, others.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", GEMMA, TOWER, {"mm_tokens_per_image": 4}),
    "gemma4": (
        "Gemma4",
        {**GEMMA4, "num_kv_shared_layers": 2},
        {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        {"audio_config": None},
    ),
    "gemma4-unified": ("Gemma4Unified", {**GEMMA4, "hidden_size_per_layer_input": 0}, {}, {}),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
        {**TOWER, "model_type": "pixtral", "head_dim": 16},
        {"tie_word_embeddings": False},
    ),
    "qwen2vl": (
        "Qwen2VL",
        {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 1},
        {},
    ),
    "qwen25vl": ("Qwen2_5_VL", {"rope_parameters": MROPE, "tie_word_embeddings": True}, QWEN_TOWER, {}),
    "qwen3vl": (
        "Qwen3VL",
        {"head_dim": 16, "rope_parameters": MROPE_INTERLEAVED},
        {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        {"tie_word_embeddings": True},
    ),
    "qwen3vlmoe": (
        "Qwen3VLMoe",
        {**EXPERTS, "mlp_only_layers": [1], "rope_parameters": MROPE_INTERLEAVED},
        {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        {},
    ),
    "qwen35": (
        "Qwen3_5",
        {**DELTA, "rope_parameters": {**MROPE_INTERLEAVED, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
        {**QWEN_TOWER, "num_position_embeddings": 4},
        {"tie_word_embeddings": True},
    ),
    "qwen35moe": (
        "Qwen3_5Moe",
        {**DELTA, **QWEN_NEXT_EXPERTS, "rope_parameters": {**MROPE_INTERLEAVED, "mrope_section": [1, 1, 0]}},
        {**QWEN_TOWER, "num_position_embeddings": 4},
        {},
    ),
    "lfm2vl": (
        "Lfm2Vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
        {**TOWER, "model_type": "siglip2_vision_model", "num_patches": 4},
        {},
    ),
    "internvl-qwen3": (
        "InternVL",
        {"model_type": "qwen3", "head_dim": 16},
        {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        {"tie_word_embeddings": False},
    ),
    "internvl-qwen2": ("InternVL", {"model_type": "qwen2"}, {**TOWER, "image_size": [28, 28]}, {}),
    "llava-llama": ("Llava", {"model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}, {}),
    "llava-mistral": (
        "LlavaNext",
        {"model_type": "mistral", "sliding_window": 9},
        {**TOWER, "model_type": "clip_vision_model"},
        {},
    ),
    "llava-onevision": (
        "LlavaOnevision",
        {"model_type": "qwen2"},
        {**TOWER, "model_type": "siglip_vision_model"},
        {"tie_word_embeddings": False},
    ),
    "exaone45": (
        "Exaone4_5_",
        {"model_type": "exaone4", "sliding_window": 9, "num_hidden_layers": 4},
        {**QWEN_TOWER, "num_key_value_heads": 2, "fullatt_block_indexes": [0]},
        {},
    ),
    "museglimmer": (
        "MuseGlimmer",
        {"head_dim": 16, "sliding_window": 9, "num_hidden_layers": 5, "layer_rope_theta": [10000.0, 0, 0, 10000.0, 0]},
        {**TOWER, "pos_emb_height": 2, "pos_emb_width": 2},
        {},
    ),
    "glm4v": (
        "Glm4v",
        {"rope_parameters": {**MROPE, "mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}},
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 48},
        {},
    ),
    "glm4v-moe": (
        "Glm4vMoe",
        {**SIGMOID, "rope_parameters": {**MROPE, "mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}},
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 48},
        {},
    ),
    "cohere2-vision": (
        "Cohere2Vision",
        # transformers leaves the factor on logits out here.
        {"model_type": "cohere2", "sliding_window": 9, "num_hidden_layers": 5, "logit_scale": 1.0},
        {**TOWER, "model_type": "siglip_vision_model"},
        {},
    ),
    "smolvlm": ("SmolVLM", {"model_type": "llama"}, TOWER, {"tie_word_embeddings": True}),
    "idefics3": ("Idefics3", {"model_type": "llama"}, TOWER, {}),
}


def make(directory: Path, name: str, **changes: Any) -> Any:
    """Save a tiny random model of a case; returns transformers'."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    family, text, tower, others = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family}Config")(
            text_config={**SIZES, **text}, vision_config=tower, **others, **changes
        )
        config._attn_implementation = config.text_config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        fill(model, offset=0.0 if family == "Gemma3" else 1.0)
        model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_text_part_matches_transformers(name: str, tmp_path: Path) -> None:
    reference = make(tmp_path, name)
    compare(reference, tmp_path)


def rename(directory: Path, old: str, new: str) -> None:
    path = directory / "model.safetensors"
    tensors = {name.replace(old, new) if name.startswith(old) else name: each for name, each in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gemma3", "language_model.model.", "model.language_model."),
        ("qwen25vl", "model.", "model.language_model."),
        ("qwen3vl", "model.language_model.", "language_model.model."),
        ("llava-llama", "language_model.", "model.language_model."),
    ],
)
def test_other_prefixes(name: str, old: str, new: str, tmp_path: Path) -> None:
    """Files of other versions: the embedding shows where the text part is."""
    reference = make(tmp_path, name)
    rename(tmp_path, old, new)
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_gemma3n_as_the_hub_has_it(tmp_path: Path) -> None:
    """Its towers need a library that is not there: so the text model's file in its place, with what is not read."""
    reference = make_checkpoint(tmp_path, "Gemma3n", **GEMMA3N)
    rename(tmp_path, "model.", "model.language_model.")
    path = tmp_path / "model.safetensors"
    unread = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"]
    names = [f"model.language_model.layers.4.{name}.weight" for name in unread]
    names += ["model.vision_tower.a.weight", "model.audio_tower.b.weight", "model.embed_vision.c.weight"]
    save_file({**load_file(path), **{name: torch.ones(3, 3) for name in names}}, path, {"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_experts_as_the_hub_has_them(tmp_path: Path) -> None:
    """Transposed: [experts, in, out]."""
    reference = make(tmp_path, "qwen3vlmoe")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if ".mlp.experts." in name]
    assert len(names) == 4
    for name in names:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, path, {"format": "pt"})
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)
    tensors[names[0]] = tensors[names[0]][:, :-1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StartupError, match=r"experts\.\w+ has shape \[5, \d+, \d+\], config.json asks for \[5, "):
        load(tmp_path)


def test_flat_fields(tmp_path: Path) -> None:
    """Qwen2-VL on the hub has no text_config: its fields stand beside the tower's, and `type` is mrope."""
    reference = make(tmp_path, "qwen2vl")
    path = tmp_path / "config.json"
    text = json.loads(path.read_text())["text_config"]
    text = {name: text[name] for name in text if name not in ("model_type", "rope_parameters", "dtype")}
    scaling = {"type": "mrope", "mrope_section": [1, 1, 2]}
    edit_json(path, text_config=..., **text, rope_theta=1000000.0, rope_scaling=scaling)
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_what_a_text_part_takes_from_outside(tmp_path: Path) -> None:
    make(tmp_path, "llava-llama")
    path = tmp_path / "config.json"
    text = json.loads(path.read_text())["text_config"]
    text = {name: text[name] for name in text if name not in ("dtype", "eos_token_id", "bos_token_id")}
    edit_json(path, text_config=text, dtype="float16", eos_token_id=[7, 8], bos_token_id=5)
    spec = read_spec(tmp_path)
    assert (spec.dtype, spec.eos_token_ids, spec.bos_token_id) == ("float16", (7, 8), 5)
    assert spec.architecture == "LlavaForConditionalGeneration" and spec.outside and not spec.headless


def test_an_unknown_tensor_is_still_an_error(tmp_path: Path) -> None:
    make(tmp_path, "gemma3")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("vision_tower.") for name in tensors)
    save_file({**tensors, "mtp.norm.weight": torch.ones(3)}, path, {"format": "pt"})
    load(tmp_path)
    save_file({**tensors, "language_model.model.layers.0.extra.weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(StartupError, match=r"tensor model.layers.0.extra.weight is not part of the model"):
        load(tmp_path)


@pytest.mark.parametrize("kind", sorted(WRAPPERS.keys() - {"glm4v_moe"}))  # its sizes do not fit each other
def test_defaults_of_a_text_part(kind: str, tmp_path: Path) -> None:
    """With an empty text_config, and without one."""
    import transformers

    # Of this one, an empty text_config ends transformers.
    both = [{"model_type": kind, "text_config": {}}] if kind != "exaone4_5" else []
    for values in (*both, {"model_type": kind}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = transformers.CONFIG_MAPPING[kind].from_dict(dict(values))
        ours, text = read_spec(tmp_path), theirs.text_config
        text.allow_global_per_layer_attribute_access = True
        assert (ours.vocab_size, ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads) == (
            text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads,
            text.num_key_value_heads,
        )  # fmt: skip
        assert ours.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        assert ours.max_position_embeddings == text.max_position_embeddings
        eps = {"cohere2": "layer_norm_eps", "lfm2": "norm_eps"}.get(text.model_type, "rms_norm_eps")
        assert ours.final_norm is not None and ours.final_norm.eps == getattr(text, eps)
        rope = text.rope_parameters
        assert ours.ropes[-1].theta == rope.get("full_attention", rope)["rope_theta"]
        assert ours.longest_window == (text.sliding_window if text.model_type == "mistral" else None)
        assert ours.tie_word_embeddings == bool(getattr(theirs, "tie_word_embeddings", False))


def test_the_start_says_that_images_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "llava-llama")
    model = ModelOptions(path=str(tmp_path), load_format="dummy", dtype="float32")
    built = build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=8), device="cpu"))
    built.engine.executor.close()
    assert ("reads", "text only: requests with images are refused, the towers for them are not loaded") in (
        built.report.rows
    )
