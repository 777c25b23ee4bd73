"""Latent attention: its families against transformers in float32, what they refuse, and the same bits in any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from engine.models.mixers import LatentAttention
from engine.models.registry import read_spec
from tests.models.support import Runner, compare, edit_json, load, make_checkpoint, prompts_of
from tests.models.test_families import SIGMOID, YARN_ROPE
from tests.test_windows import generate

LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "q_lora_rank": 28,
}
ROPE = {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.1}
MISTRAL4_ROPE = {**ROPE, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}
EXPERTS_OF_GLM = {name: value for name, value in SIGMOID.items() if name != "first_k_dense_replace"}
# Experts in four groups, of which two may be chosen from.
GROUPED = {**SIGMOID, "n_group": 4, "topk_group": 2}
BEST = {"topk_method": "group_limited_greedy", "mlp_bias": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseekv3": ("DeepseekV3", {**LATENT, **GROUPED}),
    "deepseekv3-bias": (
        "DeepseekV3",
        {**LATENT, **GROUPED, "q_lora_rank": None, "attention_bias": True, "rope_parameters": ROPE},
    ),
    "deepseekv3-halves": (
        "DeepseekV3",
        {**LATENT, **SIGMOID, "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "deepseekv2": ("DeepseekV2", {**LATENT, **SIGMOID, "q_lora_rank": None}),
    "deepseekv2-groups": ("DeepseekV2", {**LATENT, **GROUPED, **BEST, "rope_parameters": ROPE}),
    "glm4moelite": ("Glm4MoeLite", {**LATENT, **EXPERTS_OF_GLM, "mlp_layer_types": ["dense", "sparse", "dense"]}),
    "mistral4": ("Mistral4", {**LATENT, **GROUPED, "rope_parameters": MISTRAL4_ROPE}),
    "minicpm3": ("MiniCPM3", {**LATENT, "v_head_dim": None, "dim_model_base": 32}),
    "youtu": ("Youtu", LATENT),
    "axk1": ("AXK1", {**LATENT, **GROUPED}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_matches_transformers(name: str, tmp_path: Path) -> None:
    family, sizes = FAMILIES[name]
    compare(make_checkpoint(tmp_path, family, **sizes), tmp_path, generate=name == "deepseekv3")


def test_layers_that_draft_are_left_out(tmp_path: Path) -> None:
    """DeepSeek V3 has one past the last, with an embedding and an output layer of its own."""
    reference = make_checkpoint(tmp_path, "DeepseekV3", **LATENT, **GROUPED)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    extra = {
        name.replace("layers.2.", "layers.3."): each.clone() for name, each in tensors.items() if "layers.2." in name
    }
    extra["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **extra}, path, metadata={"format": "pt"})
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def read(directory: Path, architecture: str, **values: Any) -> Any:
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], **values}))
    return read_spec(directory)


def test_the_config_of_deepseek_v3(tmp_path: Path) -> None:
    """As it is on the hub; the scale is that of yarn's length, squared."""
    scaling = {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip
    spec = read(
        tmp_path,
        "DeepseekV3ForCausalLM",
        rope_scaling=scaling,
        model_type="deepseek_v3",
        max_position_embeddings=163840,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=1,
    )
    [mixer] = {layer.mixer for layer in spec.layers}
    assert isinstance(mixer, LatentAttention) and mixer.rope is not None
    assert (mixer.head_dim, mixer.num_kv_heads, mixer.rope.rotary_dim, mixer.rope.attention_scaling) == (
        576,
        1,
        64,
        1.0,
    )
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert spec.outside == ("layers.61.",) and spec.context_length == 163840
    # 671 billion without the layer that drafts.
    assert spec.num_parameters == pytest.approx(671.0e9, rel=1e-3)


def test_flags_that_may_be_null(tmp_path: Path) -> None:
    """They are as good as false then, as in transformers."""
    spec = read(tmp_path, "DeepseekV3ForCausalLM", norm_topk_prob=None, rope_interleave=None)
    assert not spec.experts[0].router.normalize and not spec.ropes[0].interleaved


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    """Its type is known to no class; heads do not divide the hidden size evenly in GLM-4.7-Flash."""
    values = {
        "model_type": "kimi_k2",
        "num_attention_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 384,
    }
    spec = read(tmp_path, "DeepseekV3ForCausalLM", **values, num_hidden_layers=3)
    assert spec.num_heads == 64 and spec.layers[0].mixer.num_heads == 64
    flash = read(tmp_path, "Glm4MoeLiteForCausalLM", model_type="glm4_moe_lite")
    assert flash.num_parameters == pytest.approx(29.94e9, rel=1e-2)


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "score": ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, 'scoring_func must be "sigmoid"'),
    "shares": (
        "DeepseekV2ForCausalLM",
        {"norm_topk_prob": True, "num_experts_per_tok": 2},
        "norm_topk_prob must be false",
    ),
    "groups": ("DeepseekV3ForCausalLM", {"n_group": 7}, "n_group (7) must divide"),
    "few": ("DeepseekV3ForCausalLM", {"n_group": 64, "topk_group": 1}, "topk_group (1 of 64) leaves fewer"),
    "method": ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc", "num_experts_per_tok": 2}, "topk_method must be"),
    "kinds": ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"]}, "num_hidden_layers = 47 entries"),
    "kind": ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["moe"] * 47}, "dense or sparse"),
    "partial": ("DeepseekV3ForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor makes 32"),
    "odd": ("YoutuForCausalLM", {"qk_rope_head_dim": 7}, "must be even"),
    "huge": ("YoutuForCausalLM", {"kv_lora_rank": 10**9}, "kv_lora_rank must be an integer from 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    architecture, values, expected = REFUSALS[name]
    with pytest.raises(StartupError) as error:
        read(tmp_path, architecture, **values)
    assert expected in str(error.value)


def test_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    """In bfloat16; in float32 every family is compared."""
    make_checkpoint(tmp_path, "DeepseekV3", **LATENT, **GROUPED)
    model = load(tmp_path, torch.bfloat16, deterministic=True)
    assert Runner(model, dtype=torch.bfloat16).same_bits(prompts_of([90])[0])


async def test_the_prefix_cache_changes_nothing(tmp_path: Path) -> None:
    """The whole engine, in a pool that is too small: tokens and log-probabilities are the same bits."""
    make_checkpoint(tmp_path, "Youtu", **LATENT, num_hidden_layers=2, max_position_embeddings=512)
    prompts = prompts_of([120, 9])
    prompts.append([*prompts[0][:90], 5, 6])
    *first, engine = await generate(tmp_path, prompts, 80, prefix_cache=True)
    assert engine.scheduler.counters.num_preemptions > 0
    *second, _ = await generate(tmp_path, prompts, 300, prefix_cache=False)
    assert first == second


def test_a_text_part_of_mistral4(tmp_path: Path) -> None:
    """Mistral Small 4 is a model for images, too; experts of a layer are one tensor."""
    reference = make_checkpoint(tmp_path, "Mistral4", **LATENT, **GROUPED, rope_parameters=MISTRAL4_ROPE)
    path = tmp_path / "model.safetensors"
    tensors = {f"language_model.{name}": each for name, each in load_file(path).items()}
    tensors["vision_tower.ln_pre.weight"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "tie_word_embeddings": False}))
    spec = read_spec(tmp_path)
    assert spec.text_only
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_deepseek_yarn(tmp_path: Path) -> None:
    """Its older name."""
    reference = make_checkpoint(tmp_path, "DeepseekV2", **LATENT, **SIGMOID, rope_parameters=ROPE)
    scaling = {name: value for name, value in ROPE.items() if name not in ("rope_type", "rope_theta")}
    edit_json(
        tmp_path / "config.json",
        rope_parameters=...,
        rope_theta=10000,
        rope_scaling={**scaling, "type": "deepseek_yarn"},
    )
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)
