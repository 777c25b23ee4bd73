"""Adapters of every kind of family against peft in float32, through the real reader and the real layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.lora.support import agree
from tests.models import test_families, test_latent

ALL = {**test_families.FAMILIES, **test_latent.FAMILIES}
# One of each kind of layer; HEAVY=1 runs all of them.
CHOSEN = (
    "granite-mamba",
    "qwen3_next",
    "lfm2_moe",
    "mixtral",
    "gemma4-experts",
    "gemma3n",
    "gptoss",
    "phi3",
    "glm4moe",
    "sarvammoe",
    "laguna",
    "cohere2moe",
    "gptneox",
    "deepseekv3",
)
# What peft will not adapt as "all-linear" there.
NAMED = {
    "nemotron-h": ["in_proj", "q_proj", "up_proj", "down_proj"],
    "falcon-h1": ["q_proj", "o_proj", "gate_proj", "down_proj"],
}
# Parameters that "all-linear" leaves out: experts whose stacks have names of their own.
STACKED: dict[str, dict[str, Any]] = {
    "gptoss": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "qwen2moe": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "granitemoe": {"target_parameters": ["input_linear.weight", "output_linear.weight"]},
    "qwen3moe": {"target_parameters": ["mlp.experts.down_proj"]},
}


# Of phimoe, transformers' router and peft's wrapper do not go together.
EVERY = [name for name in ALL if name.rsplit("-", 1)[0] not in NAMED and name not in (*NAMED, "phimoe")]


@pytest.mark.parametrize("name", EVERY if os.environ.get("HEAVY") else CHOSEN)
def test_all_linear_layers_are_pefts(name: str, tmp_path: Path) -> None:
    family, sizes = ALL[name]
    agree(tmp_path, family, sizes)


@pytest.mark.parametrize("name", NAMED)
def test_layers_with_a_state_are_pefts(name: str, tmp_path: Path) -> None:
    family, sizes = ALL[name]
    agree(tmp_path, family, sizes, target_modules=NAMED[name])


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_are_pefts(name: str, tmp_path: Path) -> None:
    family, sizes = ALL[name]
    agree(tmp_path, family, sizes, merge=name == "qwen2moe", target_modules=["q_proj"], **STACKED[name])
