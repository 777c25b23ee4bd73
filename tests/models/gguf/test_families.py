"""Every architecture: what llama.cpp's converter would write of a checkpoint gives the logits of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import StartupError
from engine.models.gguf.config import ARCHITECTURES
from engine.models.gguf.reader import open_gguf
from tests.models.gguf.export import export
from tests.models.gguf.files import array, file, scalar, string, tensor, write
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_families import DELTA, EXPERTS, GEMMA3_ROPE, GRANITE, SHARED, SIGMOID

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = [True, False, True]
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ROUTED = {**SIGMOID, "norm_topk_prob": True, "head_dim": 16}
SIGMOID_KEYS = {
    "expert_shared_count": 2,
    "expert_weights_scale": 1.7,
    "expert_weights_norm": True,
    "leading_dense_block_count": 1,
    "expert_gating_func": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16}
GRANITE_KEYS = {"embedding_scale": 12.0, "logit_scale": 8.0, "residual_scale": 0.22, "attention.scale": 0.1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
OLMO3_ROPE = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

DELTA_KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 12,
    "ssm.group_count": 3,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 120,
    "attention.recurrent_layers": [True, False, True],
}
# Name -> architecture, class, its sizes, keys beside the usual ones.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"head_dim": 20}, {}),
    "llama-tied-bias": ("llama", "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),
    "llama-linear": (
        "llama",
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {},
    ),
    "llama-yarn": ("llama", "Llama", {"rope_parameters": YARN}, {}),
    "mixtral": ("llama", "Mixtral", {**EXPERTS, "sliding_window": None}, {}),
    "qwen2": ("qwen2", "Qwen2", {}, {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "qwen2moe": ("qwen2moe", "Qwen2Moe", {**SHARED, "shared_expert_intermediate_size": 28}, {}),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", {**SHARED, "head_dim": 16, "norm_topk_prob": True}, {}),
    "gemma": ("gemma", "Gemma", {"head_dim": 16}, {}),
    "gemma2": ("gemma2", "Gemma2", GEMMA, {"attention.sliding_window": 9}),
    "gemma3": (
        "gemma3",
        "Gemma3",
        {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
        {"attention.sliding_window": 9},
    ),
    "phi3": ("phi3", "Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}, {}),
    "phi2": ("phi2", "Phi", {}, {}),
    "olmo2": ("olmo2", "Olmo2", {}, {}),
    "olmo3": (
        "olmo2",
        "Olmo3",
        {"num_hidden_layers": 5, "sliding_window": 9, "rope_parameters": OLMO3_ROPE},
        {"attention.sliding_window": 9},
    ),
    "olmoe": ("olmoe", "Olmoe", {"num_experts": 7, "num_experts_per_tok": 3}, {}),
    "granite": ("granite", "Granite", GRANITE, GRANITE_KEYS),
    "granitemoe": ("granitemoe", "GraniteMoe", {**GRANITE, **EXPERTS}, GRANITE_KEYS),
    "glm4": ("glm4", "Glm4", {"head_dim": 16}, {}),
    "glm": ("chatglm", "Glm", {"head_dim": 16}, {}),
    "glm4moe": ("glm4moe", "Glm4Moe", {**ROUTED, "use_qk_norm": True, "attention_bias": True}, SIGMOID_KEYS),
    "dots1": ("dots1", "Dots1", {**ROUTED, "sliding_window": None}, SIGMOID_KEYS),
    "starcoder2": ("starcoder2", "Starcoder2", {"sliding_window": None}, {}),
    "cohere": ("command-r", "Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25, "rope.scaling.type": "none"}),
    "cohere-norms": (
        "command-r",
        "Cohere",
        {"use_qk_norm": True},
        {"logit_scale": 0.0625, "rope.scaling.type": "none"},
    ),
    "cohere2": (
        "cohere2",
        "Cohere2",
        {"num_hidden_layers": 5, "sliding_window": 9},
        {"logit_scale": 0.0625, "attention.sliding_window": 9},
    ),
    "exaone4": (
        "exaone4",
        "Exaone4",
        {"sliding_window": 9, "layer_types": TYPES},
        {"attention.sliding_window": 9, "attention.sliding_window_pattern": LOCAL},
    ),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5}, {}),
    "seed_oss": ("seed_oss", "SeedOss", {"head_dim": 16, "attention_out_bias": True}, {}),
    "nemotron": ("nemotron", "Nemotron", {}, {}),
    "arcee": ("arcee", "Arcee", {}, {}),
    "ernie4_5": ("ernie4_5", "Ernie4_5", {"head_dim": 16}, {}),
    "lfm2": (
        "lfm2",
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "attention.layer_norm_rms_epsilon": 1e-5},
    ),
    "qwen35": ("qwen35", "Qwen3_5", DELTA, DELTA_KEYS),
    "hunyuan-dense": ("hunyuan-dense", "HunYuanDenseV1", {"head_dim": 16}, {}),
}
# By the real converter alone: transformers saves under names that the table does not know.
ELSEWHERE = {
    "ernie4_5-moe",
    "hy_v3",
    "hunyuan-moe",
    "minimax-m2",
    "mistral3",
    "qwen2vl",
    "qwen35moe",
    "qwen3vl",
    "qwen3vlmoe",
}


def test_none_is_left_out() -> None:
    assert {case[0] for case in CASES.values()} | ELSEWHERE == set(ARCHITECTURES)


def same_logits(reference: Any, model: Any, most: float = 1e-4) -> None:
    [prompt] = prompts_of([34])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(model, num_seqs=1).logits(prompt, 8), expected) <= most


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    architecture, family, sizes, keys = CASES[name]
    reference = make_checkpoint(tmp_path, family, **sizes)
    same_logits(reference, load(export(tmp_path, tmp_path / "a.gguf", architecture, keys)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_logits_of_a_quantised_file(kind: str, tmp_path: Path) -> None:
    """The weights of the checkpoint are those that the file holds, so nothing but their reading is tested."""
    import gguf
    from safetensors.torch import load_file, save_file

    reference = make_checkpoint(tmp_path, "Llama", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    number = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        if values.dim() > 1:
            tensors[name] = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), number), number)
            )
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    reference.load_state_dict(tensors, strict=False)
    ours, theirs = load(path), load(tmp_path)
    # The same weights, but packed ones round their inputs to 16 bits, which makes 2e-4 of the largest logit.
    same_logits(reference, ours, 5e-4)
    [prompt] = prompts_of([20])
    assert relative_error(Runner(ours).logits(prompt, 8), Runner(theirs).logits(prompt, 8)) <= 5e-4


@pytest.mark.parametrize(("lengths", "context"), [([30], 32), ([40], 256)])
def test_factors_of_the_rope(lengths: list[int], context: int, tmp_path: Path) -> None:
    """Phi-3's tensors rope_factors_short and _long, and Llama 3's rope_freqs."""
    short, long = [1.0, 1.1, 1.2, 1.3], [2.0, 3.0, 4.0, 5.0]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, "factor": 8.0}
    reference = make_checkpoint(tmp_path, "Phi3", original_max_position_embeddings=32, rope_parameters=rope)
    attention = (1 + np.log(8) / np.log(32)) ** 0.5
    keys = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": float(attention)}
    keys["rope.scaling.type"] = "longrope"
    tensors = {"rope_factors_short": short, "rope_factors_long": long}
    model = load(export(tmp_path, tmp_path / "a.gguf", "phi3", keys, extra=tensors), max_model_len=context)
    [prompt] = prompts_of(lengths)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(model, num_seqs=1, max_model_len=context).logits(prompt, 8), expected) <= 1e-4


def test_factors_of_llama_3(tmp_path: Path) -> None:
    rope = {**LLAMA3, "original_max_position_embeddings": 32}
    reference = make_checkpoint(tmp_path, "Llama", head_dim=32, rope_parameters=rope)
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / reference.model.rotary_emb.inv_freq).tolist()
    same_logits(reference, load(export(tmp_path, tmp_path / "a.gguf", "llama", {}, extra={"rope_freqs": factors})))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_checkpoint(directory, "Llama", num_hidden_layers=1)
    return directory


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"general.architecture": string("nonsense")}, "'nonsense' is not supported"),
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "more layers": ({"llama.block_count": scalar("u32", 2)}, "layers.1.*is missing"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is missing"),
    "many layers": ({"llama.block_count": scalar("u32", 2**31)}, "llama.block_count must be"),
    "negative": ({"llama.embedding_length": scalar("i32", -48)}, "llama.embedding_length must be"),
    "text": ({"llama.embedding_length": string("48")}, "llama.embedding_length must be"),
    "other width": ({"llama.embedding_length": scalar("u32", 96)}, r"has shape \[211, 48\], config.json asks for"),
    "heads by layer": ({"llama.attention.head_count_kv": array("u32", [1, 2])}, "differs from layer to layer"),
    "head sizes": ({"llama.attention.value_length": scalar("u32", 4)}, "must be attention.key_length"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": scalar("f32", float("nan"))}, "epsilon must be"),
    "rope kind": ({"llama.rope.scaling.type": string("spiral")}, "must be one of none, linear, yarn, longrope"),
    "rope width": ({"llama.rope.dimension_count": scalar("u32", 999)}, "rope.dimension_count must be"),
    "end": ({"tokenizer.ggml.eos_token_id": scalar("u32", 4000000)}, "eos_token_id must be the id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_does_not_fit(name: str, checkpoint: Path, tmp_path: Path) -> None:
    changes, expected = WRONG[name]
    keys = {
        "general.architecture": string("llama"),
        "llama.block_count": scalar("u32", 2 if "by layer" in name else 1),
        "llama.context_length": scalar("u32", 256),
        "llama.embedding_length": scalar("u32", 48),
        "llama.feed_forward_length": scalar("u32", 80),
        "llama.attention.head_count": scalar("u32", 6),
        "llama.attention.head_count_kv": scalar("u32", 2),
        "llama.attention.layer_norm_rms_epsilon": scalar("f32", 1e-6),
        **changes,
    }
    source = open_gguf(export(checkpoint, tmp_path / "source.gguf", "llama", {}))
    tensors, data = [], b""
    numbers = {"F32": 0}
    for tensor_name, stored in source.tensors.items():
        tensors.append(tensor(tensor_name, stored.shape, numbers[stored.type], len(data)))
        data += stored.file.read_bytes()[stored.begin : stored.end]
        data += b"\0" * (-len(data) % 32)
    pairs = [(key, value) for key, value in keys.items() if value is not None]
    with pytest.raises(StartupError, match=expected) as caught:
        load(write(tmp_path / "a.gguf", file(pairs, tensors, data)))
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    path = export(checkpoint, tmp_path / "a.gguf", "llama", {}, extra={"blk.0.attn_sinks": [1.0, 2.0]})
    with pytest.raises(StartupError, match=r"tensor blk.0.attn_sinks.weight is not part of the model"):
        load(path)
    path = export(checkpoint, tmp_path / "b.gguf", "llama", {}, left_out="ffn_norm")
    with pytest.raises(StartupError, match=r"tensor model.layers.0.post_attention_layernorm.weight .* is missing"):
        load(path)
    path = export(checkpoint, tmp_path / "c.gguf", "llama", {}, left_out="token_embd")
    with pytest.raises(StartupError, match=r"token_embd.weight is missing"):
        load(path)
