"""Experts of quantised checkpoints: all of a layer in one tensor, in either direction, or one by one, halves apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import StartupError
from tests.models import quantised as write
from tests.models.support import Runner, edit_json, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_families import DELTA, QWEN_NEXT_EXPERTS
from tests.models.test_latent import GROUPED, LATENT, MISTRAL4_ROPE
from tests.models.test_llama4 import CASES, SIZES

IDS = prompts_of([19])[0]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("Mistral4", {**LATENT, **GROUPED, "rope_parameters": MISTRAL4_ROPE}),
    "two": ("Qwen3_5Moe", {**DELTA, **QWEN_NEXT_EXPERTS, "tie_word_embeddings": True}),
    "columns": ("Llama4", {**SIZES, **CASES["chunks"]}),
}
BLOCK = (20, 36)


def stacked(name: str, tensor: Tensor, block: tuple[int, int] | None) -> tuple[dict[str, Tensor], Tensor]:
    written = [write.float8(block)(matrix) for matrix in tensor]
    scales = torch.stack([tensors[".weight_scale"] for tensors, _ in written])
    scales = scales.view(-1) if block is None else scales
    tensors = {name: torch.stack([tensors[".weight"] for tensors, _ in written]), f"{name}_scale_inv": scales}
    return {**tensors, f"{name}_activation_scale": torch.ones(1)}, torch.stack([meant for _, meant in written])


def apart(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Of a model whose tensors are columns by rows."""
    found, meant = {}, []
    for number, matrix in enumerate(tensor):
        halves = matrix.T.chunk(2) if "gate_up" in name else [matrix.T]
        parts = [write.pack_quantized(8, None)(half.contiguous()) for half in halves]
        names = ["gate", "up"] if len(parts) == 2 else ["down"]
        for half, (tensors, _) in zip(names, parts, strict=True):
            module = f"{name.rpartition('.')[0]}.{number}.{half}_proj"
            found |= {module + suffix: each for suffix, each in tensors.items()}
        meant.append(torch.cat([each for _, each in parts]).T)
    return found, torch.stack(meant)


@pytest.mark.parametrize(
    ("model", "way"),
    [("rows", "blocks"), ("rows", "each"), ("two", "blocks"), ("columns", "blocks"), ("columns", "apart")],
)
def test_experts(model: str, way: str, tmp_path: Path) -> None:
    family, sizes = MODELS[model]
    reference = make_checkpoint(tmp_path, family, **sizes)
    parameters = dict(reference.named_parameters())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    # transformers writes those of one family one by one.
    tensors = {name: each for name, each in tensors.items() if not re.search(r"\bexperts\.(\d+\.)?\w+_proj", name)}
    stacks = [name for name, each in parameters.items() if each.dim() == 3 and "experts" in name]
    assert stacks
    for name in stacks:
        tensor = parameters[name].detach().clone()
        found, meant = (
            apart(name, tensor) if way == "apart" else stacked(name, tensor, BLOCK if way == "blocks" else None)
        )
        tensors |= found
        with torch.no_grad():
            parameters[name].copy_(meant)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path, metadata={"format": "pt"})
    config: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": list(BLOCK) if way == "blocks" else None}
    if way == "apart":
        weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    edit_json(tmp_path / "config.json", quantization_config=config)
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS])).logits[0]
    error = relative_error(Runner(load(tmp_path)).logits(IDS, 8), expected)
    assert error <= 1e-4, f"logits differ by {error:.1e}"
    if way == "blocks":
        scale = next(name for name in tensors if name.endswith("_scale_inv"))
        tensors[scale] = tensors[scale][:, 1:].contiguous()
        save_file({name: each.contiguous() for name, each in tensors.items()}, path, metadata={"format": "pt"})
        with pytest.raises(StartupError, match="has scales of shape"):
            load(tmp_path)
