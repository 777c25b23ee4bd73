"""Every option of peft that changes the arithmetic, against peft in float32, merged and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lora.support import IDS, agree

TIED = {"tie_word_embeddings": True}
ATTENTION = ["q_proj", "v_proj"]
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora": ("Llama", {}, {"use_rslora": True}),
    "patterns": (
        "Llama",
        {},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 9, "v_proj": 2},
            "alpha_pattern": {"down_proj": 3, r"layers\.[12]\.mlp\.down_proj": 50, ".*q_proj": 5},
        },
    ),
    "regex": ("Llama", {}, {"target_modules": r".*\.layers\.[02]\..*(k_proj|up_proj)"}),
    "dora": ("Qwen2", {}, {"use_dora": True}),
    "dora-fused": ("Phi3", {}, {"use_dora": True, "use_rslora": True}),
    "dora-interleaved": ("Glm4", {"head_dim": 16}, {"use_dora": True}),
    "lora-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}, {"lora_bias": True}),
    "bias-of-adapted": ("Qwen2", {}, {"bias": "lora_only", "target_modules": ATTENTION}),
    "bias-of-all": ("Qwen2", {}, {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "bias-and-dora": ("Qwen2", {}, {"bias": "lora_only", "use_dora": True}),
    "head-saved": ("Llama", {}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "embedding-saved": ("Llama", TIED, {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "both-saved-tied": (
        "Llama",
        TIED,
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "layer-saved": ("Llama", {"attention_bias": True}, {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}),
    "embedding": ("Llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-scaled": ("Gemma", {"head_dim": 16}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": ("Llama", TIED, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "head": ("Llama", {}, {"target_modules": ["lm_head", "o_proj"]}),
    "head-of-tied": ("Llama", TIED, {"target_modules": ["lm_head", "o_proj"]}),
    "tokens": ("Llama", {}, {"target_modules": ATTENTION, "trainable_token_indices": [IDS[3], IDS[11], 5]}),
    "tokens-tied": ("Llama", TIED, {"target_modules": ATTENTION, "trainable_token_indices": [IDS[3], IDS[11], 5]}),
    "tokens-by-name": (
        "Llama",
        {},
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [IDS[2]], "lm_head": [7, 9]}},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_pefts(name: str, tmp_path: Path) -> None:
    family, sizes, options = OPTIONS[name]
    agree(
        tmp_path, family, {**sizes, "num_hidden_layers": 2}, merge=name in ("patterns", "dora", "lora-bias"), **options
    )
