"""Small models of every family on the GPU and on the CPU, from the same random weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_adapters import DeviceAdapters
from engine.executor.cuda_device import CudaDevice
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import FAMILIES, read_spec
from engine.ops.attention.device import KERNEL_DTYPES, DeviceAttention
from engine.speculation.base import Proposer

BASE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
# What a family's config.json needs beside that.
EXTRA: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 40},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "Gemma2ForCausalLM": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 40,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "Gemma3ForCausalLM": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 40,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
    "GPTNeoXForCausalLM": {"hidden_act": "gelu"},
    "LagunaForCausalLM": {
        **EXPERTS,
        "shared_expert_intermediate_size": 128,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [8, 4, 2],
        "moe_router_logit_softcapping": 2.0,
    },
    "MiMoV2FlashForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "v_head_dim": 32,
        "sliding_window": 40,
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 10000.0},
        },
    },
    "PhimoeForCausalLM": {"num_local_experts": 4, "router_jitter_noise": 0.1},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "Glm4ForCausalLM": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "Phi3ForCausalLM": {"pad_token_id": 0},
    "ApertusForCausalLM": {"hidden_act": "xielu"},
    "Cohere2ForCausalLM": {"sliding_window": 40, "tie_word_embeddings": True, "logit_scale": 0.25},
    "Exaone4ForCausalLM": {"sliding_window": 40, "sliding_window_pattern": 2},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "n_group": 2,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    },
    "GraniteMoeForCausalLM": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
    },
    "Ministral3ForCausalLM": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.2,
        }
    },
    "NemotronForCausalLM": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "DeepseekV3ForCausalLM": {
        "kv_lora_rank": 128,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Llama4ForCausalLM": {
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 40,
        "floor_scale": 16,
    },
    "Gemma3nForCausalLM": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 40,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 1000,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 16,
        "tie_word_embeddings": True,
    },
    "Gemma4ForCausalLM": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 40,
        "global_head_dim": 128,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 1000,
        "hidden_size_per_layer_input": 32,
        "tie_word_embeddings": True,
    },
    "Gemma4UnifiedForCausalLM": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 40,
        "global_head_dim": 128,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "GptOssForCausalLM": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 16,
        "mamba_d_head": 64,
        "mamba_n_groups": 2,
        "mamba_d_state": 64,
        "ssm_multipliers": [0.9, 1.2, 0.7, 1.1, 1.4],
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "Lfm2MoeForCausalLM": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
    "NemotronHForCausalLM": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 128,
    },
    "Qwen3_5ForCausalLM": DELTA,
    "Qwen3NextForCausalLM": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 128},
    "Qwen3_5MoeForCausalLM": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 128},
    "Qwen2MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 128,
    },
}
# Made of the same parts as another family: only names of fields and tensors differ.
SAME_PARTS = {
    "AXK1ForCausalLM",
    "AfmoeForCausalLM",
    "ArceeForCausalLM",
    "Cohere2MoeForCausalLM",
    "CohereForCausalLM",
    "CwmForCausalLM",
    "DeepseekV2ForCausalLM",
    "Dots1ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "GemmaForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "GraniteSWAForCausalLM",
    "HYV3ForCausalLM",
    "HeliumForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "HyperCLOVAXForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM3ForCausalLM",
    "Jais2ForCausalLM",
    "MellumForCausalLM",
    "MiniCPM3ForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MinistralForCausalLM",
    "Mistral4ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "PhiForCausalLM",
    "SarvamMoEForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "SolarOpenForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
    "YoutuForCausalLM",
}
# They have layers with a recurrent state beside attention.
WITH_STATES = {
    *("FalconH1ForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "NemotronHForCausalLM"),
    *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
}
# FlashInfer has no kernels for their attention, which goes by ours on a GPU, or by torch in float32.
OUR_ATTENTION = {
    *("Llama4ForCausalLM", "GptOssForCausalLM", "MiMoV2FlashForCausalLM"),
    *("Gemma3nForCausalLM", "Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM", "LagunaForCausalLM"),
}
LIMITS = Limits(
    max_num_seqs=8, max_num_batched_tokens=256, max_model_len=256, page_size=16, num_pages=160, vocab_size=1000
)
# Attention takes q times k as it is: how large that is, is in what their norms are trained to.
UNSCALED = {"Gemma3nForCausalLM", "Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM"}
HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None


def load(architecture: str, dtype: torch.dtype, device: torch.device, max_adapters: int = 0) -> CausalLM:
    config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
    return load_config(config, dtype, device, max_adapters)


def load_config(config: dict[str, Any], dtype: torch.dtype, device: torch.device, max_adapters: int = 0) -> CausalLM:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text(json.dumps(config))
        options: dict[str, Any] = {"load_format": "dummy", "seed": 5, "max_adapters": max_adapters}
        model: Any = load_model(read_spec(directory), directory, dtype=dtype, device=device, **options)
    if UNSCALED.intersection(config["architectures"]):
        # Norms of 1 would leave scores a deviation of 8 and more, with which one key takes all and the least rounding
        # of a score decides which: in bfloat16 such a model is a third off what it says in float32.
        for layer in model._layers:
            layer.attention._q_norm.weight.mul_(layer.attention._head_dim**-0.5)
    result: CausalLM = model
    return result


def families() -> list[str]:
    return sorted(FAMILIES.keys() - SAME_PARTS - OUR_ATTENTION)


def executor(
    layer: CudaDevice,
    model: CausalLM,
    dtype: torch.dtype,
    *,
    limits: Limits = LIMITS,
    attention: str = "auto",
    kv_dtype: torch.dtype | None = None,
    cuda_graph: str = "lazy",
    module: Any = None,
    proposer: Proposer | None = None,
) -> CUDAExecutor:
    """attention: auto (FlashInfer where it is), torch, xqa or wrapper. module: what stands in for `flashinfer`.

    Asserts that FlashInfer has all kernels: a test that falls back to torch would pass and prove nothing.
    """
    if model.config.has_state:
        limits = dataclasses.replace(limits, num_snapshots=8)
    adapters: DeviceAdapters | None = None
    if model.adapted is not None:
        adapters = DeviceAdapters(model, layer, 16, limits.max_num_batched_tokens)
        limits = dataclasses.replace(limits, max_adapters=adapters.capacity)
    options: dict[str, Any] = {
        "num_pages": limits.num_pages,
        "page_size": limits.page_size,
        "groups": limits.groups,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "device": layer.device,
    }
    spec = model.attention_spec
    known = spec.common is not None or spec.latent is not None
    added: dict[str, Any] = {"cuda_graph": cuda_graph, "proposer": proposer, "adapters": adapters}
    if attention == "torch" or not known or (attention == "auto" and not HAS_FLASHINFER and module is None):
        ours = DeviceAttention(spec, **options)
        made = CUDAExecutor(model, limits, layer, ours, **added)  # which finds out what runs
        said = ours.describe()
        on_gpu = layer.device.type == "cuda" and dtype in KERNEL_DTYPES
        assert known or not on_gpu or "torch" not in said, f"kernels of ours would not be tested: {said}"
        return made
    from engine.ops.attention import flashinfer, flashinfer_latent

    backend: DeviceAttention
    if spec.latent is not None:
        backend = flashinfer_latent.Backend(spec, module=module, **options)
    else:
        backend = flashinfer.Backend(spec, decode=attention, module=module, **options)
    made = CUDAExecutor(model, limits, layer, backend, **added)
    said = backend.describe()
    assert "torch" not in said and "; no " not in said, f"kernels are missing, so that this would test torch: {said}"
    return made
