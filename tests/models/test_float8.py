"""Checkpoints in float8: what is read is what their scales say, and what is wrong with one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from tests.models.support import compare, edit_json, load, make_checkpoint
from tests.models.test_latent import GROUPED, LATENT

SCHEME: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCK = (16, 12)


def quantise(directory: Path, reference: Any, block: tuple[int, int] | None) -> None:
    """Every matrix of the layers but routers', in the file; and in the reference as it then is."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, weight in list(tensors.items()):
        if weight.dim() != 2 or "layers" not in name or name.endswith("gate.weight"):
            continue
        rows, columns = block or weight.shape
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = weight[part].abs().max() / 448
                codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                weight[part] = codes[part].float() * scales[i, j]
        tensors[name] = codes
        tensors[name.removesuffix(".weight") + ".weight_scale_inv"] = scales if block else scales.view(())
        if block is None:
            tensors[name.removesuffix(".weight") + ".activation_scale"] = torch.tensor(0.5)
        with torch.no_grad():
            owner = dict(reference.named_parameters())
            if name in owner:
                owner[name].copy_(weight)
            else:  # transformers holds the experts of a layer as one
                prefix, number, part = name.removesuffix("_proj.weight").rsplit(".", 2)
                both, inner = owner[f"{prefix}.{'down' if part == 'down' else 'gate_up'}_proj"], weight.shape[0]
                both[int(number)][slice(inner, None) if part == "up" else slice(inner)].copy_(weight)
    save_file(tensors, path, metadata={"format": "pt"})
    scheme = {**SCHEME, "weight_block_size": None if block is None else list(block)}
    edit_json(directory / "config.json", quantization_config=scheme)


@pytest.mark.parametrize("block", [BLOCK, None])
def test_matches_the_dequantised_model(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Blocks that no size of a matrix divides; experts, of which each has scales of its own."""
    reference = make_checkpoint(tmp_path, "DeepseekV3", **LATENT, **GROUPED)
    quantise(tmp_path, reference, block)
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)


def damaged(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


O_PROJ = "model.layers.0.self_attn.o_proj"
DAMAGES: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "scale": (f"{O_PROJ}.weight_scale_inv", None, f"{O_PROJ}.weight has dtype F8_E4M3"),
    "weight": (f"{O_PROJ}.weight", None, f"(fp8): tensor {O_PROJ}.weight is missing"),
    "shape": (f"{O_PROJ}.weight_scale_inv", torch.ones(2, 2), "weight_block_size in config.json asks for [3, 4]"),
    "dtype": (f"{O_PROJ}.weight", torch.ones(48, 48), "has dtype F32, only F8_E4M3"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages(name: str, tmp_path: Path) -> None:
    tensor, other, expected = DAMAGES[name]
    quantise(tmp_path, make_checkpoint(tmp_path, "Llama"), BLOCK)
    damaged(tmp_path, tensor, other)
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert expected in str(error.value)


SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"fmt": "e5m2"}, "quantization_config.fmt must be e4m3"),
    "block": ({"weight_block_size": [128]}, "weight_block_size must be two integers"),
    "zero": ({"weight_block_size": [0, 128]}, "weight_block_size must be two integers"),
    "experts": ({"expert_dtype": "fp3"}, 'expert_dtype ("fp3") is not supported'),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str, tmp_path: Path) -> None:
    values, expected = SCHEMES[name]
    make_checkpoint(tmp_path, "Llama")
    edit_json(tmp_path / "config.json", quantization_config={**SCHEME, **values})
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert expected in str(error.value)
