"""For the tests of adapters: directories as peft writes them, by peft where it is there, and our answers with them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.lora.reader import LoadedWeights, read_adapter
from engine.models.parts.decoder import CausalLM
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error

# Of an adapter that changes a tiny model's answer as much as the model itself makes it.
STRENGTH = 0.7
IDS = prompts_of([30])[0]


def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is the reference of these tests and is not installed")


def wrapped(model: Any, seed: int = 1, **options: Any) -> Any:
    """transformers' model with an adapter of random weights around it, by peft."""
    library = peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
        adapted = library.get_peft_model(model, library.LoraConfig(**options))
    randomise(adapted, seed)
    return adapted.eval()


def randomise(adapted: Any, seed: int = 1) -> None:
    """Whatever is trained gets random numbers, or is moved away from what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "magnitude" in name:
                value.mul_(1 + 0.3 * noise.abs())
            elif "lora_" in name:
                value.copy_(noise * STRENGTH * (value.shape[-1] ** -0.5 if value.dim() > 1 else 0.3))
            elif value.requires_grad:
                value.add_(noise * 0.3 * value.std())


def save(adapted: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(directory)
    return directory


def theirs(adapted: Any, ids: list[int] = IDS) -> Tensor:
    """float32 [len(ids), vocab]."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logits: Tensor = adapted(torch.tensor([ids])).logits[0].float()
    return logits


def read(directory: Path, model: CausalLM, max_rank: int = 64) -> LoadedWeights:
    assert model.adapted is not None
    return read_adapter(directory, model.adapted, max_rank)  # type: ignore[arg-type]


def ours(model: CausalLM, index: int, ids: list[int] = IDS, chunk: int = 8) -> Tensor:
    """The same of ours, of rows that all have the adapter of an index."""
    assert model.adapted is not None
    model.adapted.rows.use(index)
    logits = Runner(model, num_seqs=1).logits(ids, chunk)
    model.adapted.rows.use(0)
    return logits


def agree(directory: Path, family: str, sizes: dict[str, Any], merge: bool = False, **options: Any) -> LoadedWeights:
    """An adapter that peft made for a family: our logits are peft's to 1e-4, and not the base's."""
    reference = make_checkpoint(directory / "base", family, **sizes)
    base = theirs(reference)
    adapted = wrapped(reference, **options)
    save(adapted, directory / "adapter")
    model = load(directory / "base", max_adapters=1)
    assert model.adapted is not None
    weights = read(directory / "adapter", model)
    model.adapted.put(1, weights.branches)
    expected = theirs(adapted)
    check(ours(model, 1), expected, base)
    assert relative_error(ours(model, 0), base) < 1e-4
    if merge:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = adapted.merge_and_unload()
        check(ours(model, 1), theirs(merged), base)
    return weights


def check(got: Tensor, expected: Tensor, base: Tensor) -> None:
    error = relative_error(got, expected)
    assert error < 1e-4, f"logits differ by {error:.1e}"
    assert relative_error(base, expected) > 0.01, "the adapter changes next to nothing"
