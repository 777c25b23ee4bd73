"""Every family against transformers in float32, through the real loading code, with each switch it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.support import Runner, compare, edit_json, load, make_checkpoint, prompts_of, relative_error

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24}

OLMO3_ROPE = {
    "full_attention": {**YARN_ROPE, "attention_factor": 1.2},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MINISTRAL3_ROPE = {
    **YARN_ROPE,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": 9,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", *ALTERNATING, "full_attention"],
    "vocab_size_per_layer_input": 211,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 30.0,
}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
    "num_global_key_value_heads": 1,
}
GEMMA3N = {
    "head_dim": 16,
    "sliding_window": 9,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", *ALTERNATING, "sliding_attention"],
    "num_kv_shared_layers": 2,
    "intermediate_size": [80, 72, 80, 64, 80],
    "activation_sparsity_pattern": [0.9, 0.0, 0.3, 0.0, 0.0],
    "vocab_size_per_layer_input": 150,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 6,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "tie_word_embeddings": True,
}

GRANITE_4 = {
    "layer_types": ["full_attention"] * 3,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 56,
    "mamba_n_heads": 6,
}
ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
SHARED = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}

HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# A window and a rope that differ by the layer's type.
BY_TYPE = {
    "layer_types": ALTERNATING,
    "sliding_window": 9,
    "rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": HALF_ROPE},
}
COHERE_MOE = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "num_shared_experts": 2,
    "sliding_window": 9,
}
LAGUNA = {**SHARED, "head_dim": 16, "shared_expert_intermediate_size": 40}

# Sizes of heads that no vector divides.
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
QWEN_NEXT_EXPERTS = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
LFM2_MOE = {
    "layer_types": ["conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.7,
}

GRANITE_MAMBA = {
    **GRANITE,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 56,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "mamba_d_state": 20,
}
GRANITE_MAMBA_GROUPS = {
    "mamba_n_groups": 2,
    "mamba_proj_bias": True,
    "mamba_conv_bias": False,
    "mamba_d_conv": 3,
    "time_step_limit": [0.3, 0.9],
    "num_local_experts": 5,
}

NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 20,
    "n_groups": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}
NEMOTRON_H_LATENT = {
    "moe_latent_size": 20,
    "n_group": 2,
    "use_bias": True,
    "mlp_bias": True,
    "time_step_min": 0.4,
    "tie_word_embeddings": True,
}

FALCON_H1 = {
    "mamba_d_ssm": 80,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 20,
    "mlp_multipliers": [0.8, 1.3],
    "ssm_multipliers": [0.9, 1.2, 0.7, 1.1, 1.4],
    "key_multiplier": 0.6,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.2,
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.7,
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.4,
}
FALCON_H1_NORM = {
    "mamba_d_ssm": 96,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": True,
    "projectors_bias": False,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite-mamba": ("GraniteMoeHybrid", GRANITE_MAMBA),
    "granite-mamba-groups": ("GraniteMoeHybrid", {**GRANITE_MAMBA, **GRANITE_MAMBA_GROUPS}),
    "nemotron-h": ("NemotronH", NEMOTRON_H),
    "nemotron-h-latent": ("NemotronH", {**NEMOTRON_H, **NEMOTRON_H_LATENT}),
    "falcon-h1": ("FalconH1", FALCON_H1),
    "falcon-h1-norm": ("FalconH1", {**FALCON_H1, **FALCON_H1_NORM}),
    "llama": ("Llama", {}),
    "qwen3_next": ("Qwen3Next", {**DELTA, **QWEN_NEXT_EXPERTS}),
    "qwen3_5": ("Qwen3_5", {**DELTA, "linear_num_value_heads": 3, "attention_bias": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **QWEN_NEXT_EXPERTS, "tie_word_embeddings": True}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}),
    "lfm2-bias": (
        "Lfm2",
        {"full_attn_idxs": [1], "conv_bias": True, "conv_L_cache": 5, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": ("Lfm2Moe", LFM2_MOE),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": QWEN_ROPE}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied-bias": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 12}),
    "mixtral": ("Mixtral", EXPERTS),
    "mixtral-window": ("Mixtral", {**EXPERTS, "sliding_window": 9, "num_experts_per_tok": 5}),
    "qwen3moe": ("Qwen3Moe", QWEN_EXPERTS),
    "qwen3moe-normalized": ("Qwen3Moe", {**QWEN_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3moe-sparse": ("Qwen3Moe", {**QWEN_EXPERTS, "decoder_sparse_step": 2}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2-no-caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-small-caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3-long": ("Gemma3", {**GEMMA, "sliding_window": 512, "rope_parameters": GEMMA3_ROPE}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}),
    "phi3-window": ("Phi3", {"sliding_window": 9, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "olmo2-bias": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4-no-bias": ("Glm4", {"head_dim": 8, "attention_bias": False}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 1]}),
    "gemma4": ("Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4-own-inputs": ("Gemma4", {**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}),
    "gemma4-experts": ("Gemma4", {**GEMMA4, **GEMMA4_EXPERTS, "attention_k_eq_v": True}),
    "gemma4unified": ("Gemma4Unified", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma3n": ("Gemma3n", GEMMA3N),
    "gemma3n-other-streams": (
        "Gemma3n",
        {**GEMMA3N, "altup_num_inputs": 3, "altup_active_idx": 1, "altup_correct_scale": False},
    ),
    "gptoss": ("GptOss", {**EXPERTS, "head_dim": 16, "sliding_window": 9, "num_hidden_layers": 4}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 9, "rope_parameters": OLMO3_ROPE}),
    "seedoss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    "glm": ("Glm", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "granite": ("Granite", GRANITE),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 5, "sliding_window": 9}),
    "exaone4-no-window": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 5, "sliding_window": 9}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "nemotron": ("Nemotron", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 9}),
    "phi": ("Phi", {}),
    "hunyuandensev1": ("HunYuanDenseV1", {"head_dim": 16, "attention_bias": True}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 9, "layer_types": ALTERNATING}),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE}),
    "hunyuan-alpha": ("HunYuanDenseV1", {"head_dim": 16, "rope_parameters": ALPHA_ROPE}),
    "qwen2moe": ("Qwen2Moe", {**SHARED, "shared_expert_intermediate_size": 28, "norm_topk_prob": True}),
    "qwen2moe-window": (
        "Qwen2Moe",
        {**SHARED, "shared_expert_intermediate_size": 28, "use_sliding_window": True, "sliding_window": 9},
    ),
    "olmoe": ("Olmoe", {"num_experts": 7, "num_experts_per_tok": 3}),
    "granitemoe": ("GraniteMoe", {**GRANITE, **EXPERTS}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**GRANITE, **GRANITE_4, "num_local_experts": 0}),
    "granitemoehybrid-experts": ("GraniteMoeHybrid", {**GRANITE, **GRANITE_4, **EXPERTS}),
    "granitemoehybrid-no-rope": (
        "GraniteMoeHybrid",
        {**GRANITE, **GRANITE_4, "num_local_experts": 0, "position_embedding_type": "nope"},
    ),
    "glm4moe": ("Glm4Moe", {**SIGMOID, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "glm4moe-groups": ("Glm4Moe", {**SIGMOID, "head_dim": 16, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    "minimaxm2": (
        "MiniMaxM2",
        {**EXPERTS, "head_dim": 16, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "hyv3": ("HYV3", {**SHARED, "head_dim": 16}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 24}),
    "hunyuanmoev1": ("HunYuanMoEV1", {"num_experts": 7, "moe_topk": 3, "head_dim": 16}),
    "dots1": ("Dots1", {**SIGMOID, "sliding_window": 9, "max_window_layers": 1, "norm_topk_prob": True}),
    "apertus": ("Apertus", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere-norms": ("Cohere", {"use_qk_norm": True, "attention_bias": True}),
    "exaonemoe": ("ExaoneMoe", {**SHARED, "num_hidden_layers": 4, "sliding_window": 9, "num_shared_experts": 2}),
    "solaropen": ("SolarOpen", {**SIGMOID, "head_dim": 16, "attention_bias": True, "n_group": 2}),
    "mellum": (
        "Mellum",
        {
            **BY_TYPE,
            **SHARED,
            "head_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": OLMO3_ROPE,
        },
    ),
    "cohere2moe": ("Cohere2Moe", {**COHERE_MOE, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 56}),
    "cohere2moe-sigmoid": (
        "Cohere2Moe",
        {
            **COHERE_MOE,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "shared_expert_combination_strategy": "sum",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
        },
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLm",
        {"use_parallel_residual": True, "rope_parameters": HALF_ROPE, "qk_layernorm": True},
    ),
    "olmo": ("Olmo", {"clip_qkv": 0.7}),
    "phimoe": ("Phimoe", {"num_local_experts": 5, "lm_head_bias": True, "router_jitter_noise": 0.3}),
    "gptneox": ("GPTNeoX", {"rope_parameters": HALF_ROPE}),
    "gptneox-serial": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "hyperclovax": ("HyperCLOVAX", {**GRANITE, "logits_scaling": 0.5, "mlp_bias": True}),
    "graniteswa": ("GraniteSWA", {**GRANITE, "sliding_window": 9, "layer_rope_theta": [500.0, 0, 10000.0]}),
    "granitemoeswa": ("GraniteMoeSWA", {**GRANITE, "num_local_experts": 5, "sliding_window": 9}),
    "granitemoeshared": ("GraniteMoeShared", {**GRANITE, "num_local_experts": 5, "shared_intermediate_size": 40}),
    "helium": ("Helium", {"head_dim": 8, "attention_bias": True}),
    "cwm": ("Cwm", {"head_dim": 16, "sliding_window": 9}),
    "jais2": ("Jais2", {}),
    "internlm3": ("InternLM3", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("IQuestCoder", {"head_dim": 16}),
    "sarvammoe": ("SarvamMoE", {**SIGMOID, "head_dim": 16}),
    "vaultgemma": ("VaultGemma", GEMMA),
    "mimov2flash": ("MiMoV2Flash", {**BY_TYPE, **SIGMOID, "head_dim": 16, "v_head_dim": 10, "num_key_value_heads": 1}),
    "flexolmo": ("FlexOlmo", {"num_experts": 5, "num_experts_per_tok": 2}),
    "laguna": (
        "Laguna",
        {**BY_TYPE, **LAGUNA, "num_attention_heads_per_layer": [6, 4, 2], "moe_routed_scaling_factor": 1.7},
    ),
    "laguna-element": ("Laguna", {**LAGUNA, "gating": "per-element", "moe_router_logit_softcapping": 0.8}),
    "afmoe": (
        "Afmoe",
        {**SHARED, "head_dim": 16, "sliding_window": 9, "layer_types": ALTERNATING, "mup_enabled": True},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "yarn-mscale": ("Qwen3", {"head_dim": 32, "rope_parameters": {**YARN_ROPE, **MSCALE}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
}


# One of each kind of memory: transformers' own loop and cache come to the same text. For all others its one pass over
# our text does, which says the same of every token.
GENERATED = {"llama", "gemma3", "qwen3_next", "lfm2", "granite-mamba"}
# Of each class; the others differ in a switch, and need not go on for as long.
FIRST = {family: name for name, (family, _) in reversed(FAMILIES.items())}.values()


@pytest.mark.parametrize("name", FAMILIES)
def test_matches_transformers(name: str, tmp_path: Path) -> None:
    family, sizes = FAMILIES[name]
    reference = make_checkpoint(tmp_path, family, **sizes)
    compare(reference, tmp_path, new_tokens=64 if name in FIRST else 32, generate=name in GENERATED)


# Classes that transformers does not have: the one that computes the same, its fields, and what else their file says.
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "BailingMoeV2": (
        "SarvamMoE",
        {**SIGMOID, "head_dim": 16, "n_group": 4, "topk_group": 2, "partial_rotary_factor": 0.5},
        {"rope_parameters": ..., "rope_theta": 8e6, "n_routed_experts": ..., "num_experts": 8, "use_bias": False},
    ),
    "LLaMA": ("Llama", {}, {}),
    "MiMo": ("Qwen2", {}, {}),
    "MiniCPM": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 * 3**-0.5,
            "logits_scaling": 3.0,
            "attention_multiplier": 8**-0.5,
        },
        {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "logits_scaling": ..., "residual_multiplier": ...},
    ),
    "TeleChat3": ("Llama", {"head_dim": 12}, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_classes_that_transformers_does_not_have(name: str, tmp_path: Path) -> None:
    family, sizes, changes = OTHERS[name]
    reference = make_checkpoint(tmp_path, family, **sizes)
    edit_json(tmp_path / "config.json", architectures=[f"{name}ForCausalLM"], model_type="other", **changes)
    if name == "MiMo":
        path = tmp_path / "model.safetensors"
        drafting = {"model.mtp_layers.0.input_proj.weight": torch.ones(48, 96)}
        save_file({**load_file(path), **drafting}, path, metadata={"format": "pt"})
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)


def test_mimo_v2_flash_as_the_hub_has_it(tmp_path: Path) -> None:
    """Patterns of 0 and 1, bases beside each other, and a window without its query."""
    sizes = FAMILIES["mimov2flash"][1]
    ropes = {
        kind: {**HALF_ROPE, "rope_theta": base} for kind, base in (("full_attention", 5e6), ("sliding_attention", 1e4))
    }
    reference = make_checkpoint(tmp_path, "MiMoV2Flash", **{**sizes, "rope_parameters": ropes})
    edit_json(
        tmp_path / "config.json",
        **dict.fromkeys(("rope_parameters", "layer_types", "mlp_layer_types", "sliding_window"), ...),
        hybrid_layer_pattern=[1, 0, 1],
        moe_layer_freq=[0, 1, 1],
        sliding_window_size=8,
        rope_theta=5000000,
        swa_rope_theta=10000,
        partial_rotary_factor=0.5,
        swa_num_key_value_heads=2,
        n_shared_experts=None,
    )
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)


def test_older_form_of_rope_fields(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta beside rope_scaling, with `type` for `rope_type`, and torch_dtype."""
    reference = make_checkpoint(tmp_path, "Llama", rope_parameters=LLAMA3_ROPE, head_dim=32)
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name not in ("rope_theta", "rope_type")}
    edit_json(
        tmp_path / "config.json",
        rope_parameters=...,
        rope_theta=500000.0,
        rope_scaling={**scaling, "type": "llama3"},
        dtype=...,
        torch_dtype="float32",
    )
    compare(reference, tmp_path)


def test_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "Qwen2", dtype=torch.bfloat16)
    compare(reference, tmp_path)


def test_sharded_bfloat16_checkpoint(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "Qwen3", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    compare(reference, tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3", "Olmo2", "Glm4"])
def test_bfloat16_run_stays_near_float32(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    prompt = prompts_of([40])[0]
    wide = Runner(load(tmp_path)).logits(prompt, 16)
    narrow = Runner(load(tmp_path, torch.bfloat16), dtype=torch.bfloat16).logits(prompt, 16)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, wide) < 0.05


def test_older_form_of_gemma3(tmp_path: Path) -> None:
    """rope_theta and rope_scaling for the layers that see all, rope_local_base_freq for the others."""
    reference = make_checkpoint(tmp_path, "Gemma3", **GEMMA, num_hidden_layers=7, rope_parameters=GEMMA3_ROPE)
    edit_json(
        tmp_path / "config.json",
        rope_parameters=...,
        layer_types=...,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
    )
    compare(reference, tmp_path)


@pytest.mark.parametrize("max_model_len", [64, 256])
def test_longrope(max_model_len: int, tmp_path: Path) -> None:
    """The short factors up to the original context; the long ones for every text where more may be served."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 5.0, 9.0],
        "original_max_position_embeddings": 64,
    }
    reference = make_checkpoint(
        tmp_path, "Phi3", rope_parameters=rope, original_max_position_embeddings=64, eos_token_id=2
    )
    short = max_model_len == 64
    compare(
        reference,
        tmp_path,
        lengths=(9,) if short else (70, 90),
        new_tokens=50 if short else 64,
        max_model_len=max_model_len,
    )


def test_dynamic_rope_beyond_the_native_context(tmp_path: Path) -> None:
    """Frequencies are those that transformers uses for a text as long as may be served."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    reference = make_checkpoint(tmp_path, "Llama", rope_parameters=rope, max_position_embeddings=40)
    prompt = prompts_of([100])[0]
    ours = Runner(load(tmp_path, max_model_len=100), max_model_len=100).logits(prompt, 32)
    with torch.inference_mode():
        assert relative_error(ours, reference(torch.tensor([prompt])).logits[0]) <= 1e-4
