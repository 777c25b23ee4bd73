"""What llama.cpp's converter makes of a checkpoint of transformers, for the tests: names by the `gguf` package's table.

Facts of the format that its table does not hold are here: which architectures have rows in pairs and norms with 1
added, and which keys say what.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch

from engine.models.gguf.types import BY_NAME
from tests.models.gguf.test_dequantise import weight_blocks

PERMUTED = {"llama", "arcee", "granite", "granitemoe", "smollm3", "mistral3"}
SHIFTED = {"gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe"}
EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(\w+)\.weight")


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves of every head turned into pairs."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def export(
    directory: Path,
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    kind: str | None = None,
    *,
    extra: dict[str, list[float]] | None = None,
    left_out: str = "",
    more: dict[str, Any] | None = None,
    blocks: dict[str, str] | None = None,
) -> Path:
    """keys: what the metadata says beside what all architectures do. kind: of matrices; F32 where it is None.

    extra: more tensors. left_out: part of the file's name of one that is not to be there. more: keys by whole names.
    blocks: part of a matrix's name in the file -> the type of the random blocks that it is made of there.
    """
    config = json.loads((directory / "config.json").read_text())
    loaded = safetensors.torch.load_file(directory / "model.safetensors")
    tensors = {name: values.float().numpy() for name, values in loaded.items()}
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**common(config), **keys}.items():
        add(writer, f"{architecture}.{name}", value)
    for name, value in (more or {}).items():
        add(writer, name, value)
    for name, values in converted(tensors, architecture, config).items():
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert given is not None, name
        if left_out and left_out in given:
            continue
        if given.endswith("exp_probs_b.weight"):
            given = given.replace(".weight", ".bias")
        block = next((each for part, each in (blocks or {}).items() if part in given and values.ndim in (2, 3)), None)
        if block is not None:
            size = BY_NAME[block]
            raw = weight_blocks(block, values.size // size.elements, seed=len(given))
            writer.add_tensor(given, raw.reshape(*values.shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[block])
        elif kind is not None and values.ndim > 1 and values.shape[-1] % 32 == 0:
            number_of_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(given, gguf.quants.quantize(values, number_of_kind), raw_dtype=number_of_kind)
        else:
            writer.add_tensor(given, values)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(f"{name}.weight", np.array(numbers, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def common(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if "rms_norm_eps" in config:
        found["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    for name in ("layer_norm_eps", "norm_eps", "norm_epsilon"):
        if name in config:
            found["attention.layer_norm_epsilon"] = float(config[name])
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    for ours, theirs in (("num_experts", "expert_count"), ("num_local_experts", "expert_count"),
                         ("n_routed_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count"),
                         ("moe_intermediate_size", "expert_feed_forward_length")):  # fmt: skip
        if config.get(ours):
            found[theirs] = config[ours]
    return found


def tiled(values: np.ndarray, first: int, keys: int, width: int) -> np.ndarray:
    """Heads that one key head serves as far apart as can be; those before row `first` stay."""
    heads = values[first:].reshape(keys, -1, width, *values.shape[1:]).swapaxes(0, 1)
    return np.concatenate((values[:first], heads.reshape(-1, *values.shape[1:])))


def delta_part(name: str, values: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Of a gated delta net."""
    keys, width = config["linear_num_key_heads"], config["linear_value_head_dim"]
    before = 2 * keys * config["linear_key_head_dim"]
    part = name.split(".linear_attn.")[1]
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        values = tiled(values.reshape(len(values), -1), before, keys, width)
    elif part == "in_proj_z.weight":
        values = tiled(values, 0, keys, width)
    elif part == "out_proj.weight":
        values = tiled(values.T, 0, keys, width).T
    elif part != "norm.weight":
        values = tiled(values, 0, keys, 1)
    if part == "A_log":
        values = -np.exp(values)
    return name.replace("dt_bias", "dt_proj.bias"), np.ascontiguousarray(values)


def converted(tensors: dict[str, np.ndarray], architecture: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        values = np.ascontiguousarray(values, dtype=np.float32)
        if architecture in PERMUTED and (match := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            values = permuted(values, heads)
        if ".linear_attn." in name:
            name, values = delta_part(name, values, config)
        if ".conv.conv." in name:
            values = values[:, 0]
        if architecture in SHIFTED and name.endswith("norm.weight") and ".linear_attn." not in name:
            values = values + 1
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}{match[3]}.weight", {})[int(match[2])] = values
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            gate, up = np.split(values, 2, axis=1)
            stem = name.removesuffix("block_sparse_moe.input_linear.weight")
            found[f"{stem}mlp.experts.gate_proj.weight"] = np.ascontiguousarray(gate)
            found[f"{stem}mlp.experts.up_proj.weight"] = np.ascontiguousarray(up)
        elif "e_score_correction_bias" in name:
            found[name.replace("e_score_correction_bias", "e_score_correction")] = values.reshape(-1)
        else:
            found[name] = values
    for name, each in experts.items():
        if re.search(r"experts\.w\d", name):
            name = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        found[name] = np.stack([each[number] for number in range(len(each))])
    return found
