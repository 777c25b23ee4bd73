"""Ranks that read their parts of a checkpoint compute what one process computes, for every kind of part there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import StartupError
from engine.models.loading.slices import refuse
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.ranks import Ranks
from tests.distributed.together import load_part, together
from tests.models.gguf.export import export
from tests.models.support import Runner, edit_json, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_families import (
    DELTA,
    FALCON_H1,
    FALCON_H1_NORM,
    GEMMA,
    GEMMA4,
    GEMMA4_EXPERTS,
    GRANITE_MAMBA,
    GRANITE_MAMBA_GROUPS,
    NEMOTRON_H,
    QWEN_EXPERTS,
    QWEN_NEXT_EXPERTS,
)
from tests.models.test_gpt_oss import MXFP4
from tests.models.test_latent import GROUPED, LATENT

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
# name: (class of transformers, what differs, ranks)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    # With 4 ranks two have the same key head.
    "tied": ("Llama", {"tie_word_embeddings": True}, (2, 4)),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, (3,)),
    "norms of heads": ("Qwen3", {"head_dim": 16}, (4,)),
    "windows and caps": ("Gemma2", GEMMA, (2,)),
    "fused": ("Phi3", {}, (2,)),
    "key heads in turn": ("GPTNeoX", {}, (4,)),
    "own norms": ("StableLm", {"qk_layernorm": True}, (2,)),
    "ungated": ("Starcoder2", {"use_bias": True}, (2,)),
    "pairs, parallel": ("Cohere", {}, (2,)),
    "experts": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, (2, 4)),
    "shared experts": (
        "Qwen2Moe",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
        (2,),
    ),
    "clamped experts, sinks": (
        "GptOss",
        {"head_dim": 16, "sliding_window": 9, "num_local_experts": 5, "num_experts_per_tok": 2},
        (2,),
    ),
    "latents": ("DeepseekV3", {**LATENT, **GROUPED, "num_key_value_heads": 8}, (4,)),
    "delta nets, packed": (
        "Qwen3Next",
        {**DELTA, **QWEN_NEXT_EXPERTS, "num_hidden_layers": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        (2,),
    ),
    "delta nets that are whole in every rank": ("Qwen3_5", {**DELTA, "num_hidden_layers": 3}, (2,)),
    "delta nets": (
        "Qwen3_5",
        {**DELTA, "num_hidden_layers": 3, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
        (2, 4),
    ),
    "short convolutions": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_bias": True},
        (2,),
    ),
    "state spaces": ("GraniteMoeHybrid", {**GRANITE_MAMBA, **GRANITE_MAMBA_GROUPS, "num_hidden_layers": 3}, (2,)),
    "state spaces beside attention": ("FalconH1", FALCON_H1, (2,)),
    "state spaces, normed after the gate": ("FalconH1", {**FALCON_H1, **FALCON_H1_NORM}, (2,)),
    "state spaces by turns": ("NemotronH", NEMOTRON_H, (2,)),
    "dense beside experts": ("Gemma4", {**GEMMA4, **GEMMA4_EXPERTS, "num_hidden_layers": 5}, (2,)),
}


def both(
    directory: Path, size: int, *, expert_parallel: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Logits of one process and of `size` ranks, and whether the latter's hidden states are the same in any batch."""
    [text] = prompts_of([40])
    whole = Runner(load(directory, **options)).logits(text, 7)

    def work(ranks: Ranks) -> tuple[torch.Tensor, bool]:
        part = load_part(directory, ranks, expert_parallel=expert_parallel, **options)
        runner = Runner(part)  # type: ignore[arg-type]
        return runner.logits(text, 7), runner.same_bits(text)

    results = together(size, work)
    return whole, results[0][0], all(same for _, same in results)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, (_, _, sizes) in FAMILIES.items() for size in sizes])
def test_parts_make_the_whole(name: str, size: int, tmp_path: Path) -> None:
    family, differing, _ = FAMILIES[name]
    sizes = {**SIZES, **differing}
    if size == 3:
        sizes |= {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    make_checkpoint(tmp_path, family, **sizes)
    whole, parts, same = both(tmp_path, size)
    assert relative_error(parts, whole) < 1e-5
    assert same or native.library() is None


def test_tokens_are_the_same_bits_where_each_rank_has_one_block_of_columns(tmp_path: Path) -> None:
    # Sums go over blocks of 256 columns.
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "hidden_size": 512, "intermediate_size": 512})
    whole, parts, _ = both(tmp_path, 2)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("family", "sizes", "size", "stacked"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, False),
        ("Qwen2Moe", {**QWEN_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}, 2, False),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, 2, False),
        # As a GPU has them: by its kernels, and those that these do not know.
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, True),
        ("NemotronH", NEMOTRON_H, 2, True),
    ],
)
def test_experts_that_each_rank_has_whole(
    family: str, sizes: dict[str, Any], size: int, stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.parts.experts.keeps_experts_stacked", lambda device: stacked)
    sizes = {**SIZES, **sizes} | ({"num_experts": 6} if family == "Qwen2Moe" else {})
    make_checkpoint(tmp_path, family, **sizes)
    whole, parts, same = both(tmp_path, size, expert_parallel=True)
    assert relative_error(parts, whole) < 1e-5
    assert same or stacked or native.library() is None
    why = refuse(read_spec(tmp_path), 8, expert_parallel=True)
    assert why is not None and "does not divide the" in why


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_rounded_weights_are_those_of_one_process(quantisation: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "head_dim": 32, "intermediate_size": 128})
    whole, parts, _ = both(tmp_path, 2, quantisation=quantisation)
    assert relative_error(parts, whole) < 1e-4


@pytest.mark.parametrize("block", ["Q4_K", "Q8_0", "IQ4_NL"])
def test_parts_of_packed_blocks(block: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 512, "num_hidden_layers": 1}
    make_checkpoint(tmp_path, "Llama", **sizes)
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks={"": block})
    whole, parts, _ = both(path, 2)
    assert relative_error(parts, whole) < 1e-4


def test_a_cut_through_a_block_is_one_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "hidden_size": 256, "intermediate_size": 256})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks={"ffn_down": "Q4_K"})
    with pytest.raises(StartupError, match=r"down_proj.weight is in blocks of 256 columns \(Q4_K\).*128 of its 256"):
        together(2, lambda ranks: load_part(path, ranks))


@pytest.mark.parametrize(
    ("family", "sizes", "size", "expected"),
    [
        ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, 4, "does not divide the 2 attention heads"),
        ("Llama", {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3}, 2, "3 key heads of Llama"),
        ("Llama", {"intermediate_size": 90}, 4, "does not divide the 90 inner numbers of a feed-forward"),
        ("Llama", {"vocab_size": 5}, 4, "a vocabulary of 5 tokens is too small"),
        ("Olmo2", {}, 2, "norms all heads at once"),
    ],
)
def test_what_cannot_be_divided_is_one_line(
    family: str, sizes: dict[str, Any], size: int, expected: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    values = {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    why = refuse(read_spec(tmp_path), size)
    assert why is not None and why.startswith(f"--tensor-parallel-size {size}: ") and expected in why


def test_random_weights_are_those_of_one_process(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", **SIZES)
    whole, parts, _ = both(tmp_path, 2, load_format="dummy")
    assert relative_error(parts, whole) < 1e-5


def test_experts_in_four_bits(tmp_path: Path) -> None:
    sizes = {**SIZES, "head_dim": 16, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    make_checkpoint(tmp_path, "GptOss", **sizes)
    edit_json(tmp_path / "config.json", quantization_config=MXFP4)
    whole, parts, _ = both(tmp_path, 2, load_format="dummy")
    assert relative_error(parts, whole) < 1e-4  # inputs of 16 bits
    whole, parts, _ = both(tmp_path, 4, load_format="dummy", expert_parallel=True)
    assert relative_error(parts, whole) < 1e-4  # inputs of 16 bits
    why = refuse(read_spec(tmp_path), 8)
    assert why is not None and "blocks of 32 columns, and a rank would have 16" in why
