"""Parts of LoRA adapters make the whole, for every kind of layer that ranks divide: products, tables, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.lora.reader import read_adapter
from engine.models.loading.adapted import AdaptedLayers, Heads
from engine.models.loading.weights import OUTPUT
from engine.ops.ranks import Ranks
from tests.distributed.test_slices import FAMILIES, SIZES
from tests.distributed.together import load_part, together
from tests.lora.handmade import PREFIX, factors, write
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error

EXPERTS = ("experts", "shared experts", "clamped experts, sinks")


def adapter(layers: AdaptedLayers, folder: Path, name: str) -> Path:
    """Factors for all modules, magnitudes where the base's numbers can be had, and rows of an embedding."""
    tensors = factors(layers, 3, len(name))
    places = layers.places.values()
    magnitudes = not any(isinstance(each.linear, Heads) or (each.is_table and each.site == OUTPUT) for each in places)
    for module, place in layers.places.items():
        if place.is_table:
            width, vocab = place.linear.in_features, place.count
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = torch.randn(3, vocab) * 0.1
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = torch.randn(width, 3)
        elif isinstance(place.linear, Heads):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(3, place.linear.in_features) * 0.3
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(place.count, 3)
        elif magnitudes:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(place.count) + 0.5
    return write(folder / "adapter", tensors, r=3, lora_alpha=6, use_dora=magnitudes)


@pytest.mark.parametrize(
    ("name", "size", "expert_parallel"),
    [(name, sizes[-1], False) for name, (_, _, sizes) in FAMILIES.items()] + [(name, 2, True) for name in EXPERTS],
)
def test_parts_make_the_whole(name: str, size: int, expert_parallel: bool, tmp_path: Path) -> None:
    family, differing, _ = FAMILIES[name]
    sizes: dict[str, Any] = {**SIZES, **differing}
    if size == 3:
        sizes |= {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    if expert_parallel:
        sizes |= {key: 4 for key in ("num_experts", "num_local_experts") if key in sizes}
    make_checkpoint(tmp_path, family, **sizes)
    [text] = prompts_of([40])
    whole = load(tmp_path, max_adapters=1)
    layers = whole.adapted
    assert isinstance(layers, AdaptedLayers)
    base = Runner(whole).logits(text, 7)
    path = adapter(layers, tmp_path, name)
    layers.put(1, read_adapter(path, layers, 8).branches)
    layers.rows.use(1)
    expected = Runner(whole).logits(text, 7)

    def work(ranks: Ranks) -> torch.Tensor:
        model = load_part(tmp_path, ranks, expert_parallel=expert_parallel, max_adapters=1)
        own = model.own.adapted
        assert isinstance(own, AdaptedLayers) and own.whole is not None
        read = read_adapter(path, own.whole, 8, lambda vector: ranks.sum(vector[None])[0])
        own.put(1, read.branches)
        own.rows.use(1)
        return Runner(model).logits(text, 7)  # type: ignore[arg-type]

    parts = together(size, work)[0]
    assert relative_error(parts, expected) < 1e-4 < 0.01 < relative_error(base, expected)
