"""Llama 4's text against transformers in float32, and what its config.json may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from engine.groups import Chunk
from engine.models.registry import read_spec
from engine.models.spec import Dense, Experts
from tests.models.support import compare, edit_json, make_checkpoint
from tests.models.test_families import LLAMA3_ROPE

SIZES = {"intermediate_size_mlp": 56, "num_local_experts": 5, "num_hidden_layers": 5, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "chunks": {"attention_chunk_size": 9, "interleave_moe_layer_step": 2, "floor_scale": 8, "attn_scale": 0.3},
    "two experts": {
        "attention_chunk_size": None,
        "num_experts_per_tok": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
    },
    "told by layer": {
        "attention_chunk_size": 16,
        "layer_types": ["full_attention", *["chunked_attention"] * 4],
        "no_rope_layers": [1, 1, 0, 0, 1],
        "moe_layers": [3],
        "head_dim": 32,
        "rope_parameters": LLAMA3_ROPE,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_matches_transformers(name: str, tmp_path: Path) -> None:
    compare(make_checkpoint(tmp_path, "Llama4", **{**SIZES, **CASES[name]}), tmp_path)


def test_the_text_part_of_a_directory_for_images(tmp_path: Path) -> None:
    """The switch of the growing queries is a number there."""
    reference = make_checkpoint(tmp_path, "Llama4", **SIZES, **CASES["chunks"])
    edit_json(tmp_path / "config.json", attn_temperature_tuning=4)
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    path = tmp_path / "model.safetensors"
    tensors = {f"language_model.{name}": each for name, each in load_file(path).items()}
    tensors["vision_model.class_embedding"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_scout(tmp_path: Path) -> None:
    """Three layers of four see blocks; all have experts."""
    values = {"model_type": "llama4_text", "max_position_embeddings": 10485760}
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = read_spec(tmp_path)
    assert spec.windows == (Chunk(8192), Chunk(8192), Chunk(8192), None) * 12
    assert all(isinstance(layer.feed_forward, Experts) for layer in spec.layers)
    (tmp_path / "config.json").write_text(json.dumps({**values, "interleave_moe_layer_step": 2, "num_experts": 128}))
    kinds = [type(layer.feed_forward) for layer in read_spec(tmp_path).layers]
    assert kinds == [Dense, Experts] * 24


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "types": ({"layer_types": ["sliding_attention"] * 48}, "layer_types must hold full_attention or chunked_attention"),
    "size": (
        {"layer_types": ["chunked_attention"] * 48, "attention_chunk_size": None},
        "attention_chunk_size is missing",
    ),
    "switch": ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning must be true or false"),
    "rope": ({"no_rope_layers": [1, 0]}, "no_rope_layers must have num_hidden_layers = 48 entries"),
    "zero": ({"attention_chunk_size": 0}, "attention_chunk_size must be an integer from 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    values, expected = REFUSALS[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text", **values}))
    with pytest.raises(StartupError) as error:
        read_spec(tmp_path)
    assert expected in str(error.value)
