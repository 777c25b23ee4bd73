"""Adapters written by hand, where no reference is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models.loading.adapted import AdaptedLayers, Heads

PREFIX = "base_model.model."


def factors(layers: AdaptedLayers, rank: int, seed: int, modules: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Random A and B for every linear module of a model, or for some."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, place in layers.places.items():
        if place.is_table or isinstance(place.linear, Heads) or (modules is not None and name not in modules):
            continue
        for end, shape in (("A", (rank, place.linear.in_features)), ("B", (place.count, rank))):
            value = torch.randn(shape, generator=generator) * 0.7 * shape[1] ** -0.5
            tensors[f"{PREFIX}{name}.lora_{end}.weight"] = value
    return tensors


def write(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A directory of an adapter. config: beside what every file has."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], **config}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file({name: value.clone() for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    return directory
