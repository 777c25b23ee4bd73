"""Adapters that cannot be served as they were trained: one line that names the adapter, what of it, and why."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.lora.files import Tensors
from engine.lora.reader import read_adapter
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers
from engine.models.parts.decoder import CausalLM
from tests.lora.handmade import PREFIX, factors, write
from tests.models.support import SIZES, load, make_checkpoint

Q = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
NORM = f"{PREFIX}model.layers.0.input_layernorm"

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "QALoRA": ({"use_qalora": True}, "QALoRA"),
    "BD-LoRA": ({"use_bdlora": True}, "BD-LoRA"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "something new": ({"use_wonders": True}, "use_wonders"),
    "rank 0": ({"r": 0}, "r = 0"),
    "rank of text": ({"r": "4"}, "r ="),
    "another rank": ({"r": 8}, "has rank 4, and 8 is asked for"),
    "alpha that is none": ({"lora_alpha": None}, "lora_alpha"),
    "endless pattern": ({"rank_pattern": {"(a+)+b": 4}}, "take for ever"),
    "endless choice": ({"alpha_pattern": {"(a|a)*b": 4}}, "take for ever"),
    "no pattern": ({"rank_pattern": {"(": 4}}, "no regular expression"),
    "patterns of another kind": ({"rank_pattern": [4]}, "must be an object"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "bias of another kind": ({"bias": "some"}, "bias"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tmp_path_factory.mktemp("base")
    make_checkpoint(directory, "Llama", num_hidden_layers=1)
    return load(directory, max_adapters=1)


@pytest.fixture
def layers(model: CausalLM) -> AdaptedLayers:
    assert isinstance(model.adapted, AdaptedLayers)
    return model.adapted


def refused(directory: Path, layers: AdaptedLayers, max_rank: int = 16) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(directory, layers, max_rank)
    text = str(caught.value)
    assert text.startswith(f"adapter {directory.name}: ") and "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_asks_for_more(name: str, layers: AdaptedLayers, tmp_path: Path) -> None:
    values, told = CONFIGS[name]
    directory = write(tmp_path / "mine", factors(layers, 4, 0, [Q]), **values)
    assert told in refused(directory, layers)


# What stands in the file, given A and B of one module, and what is told of it.
TENSORS: dict[str, tuple[Callable[[Tensor, Tensor], dict[str, Tensor]], str]] = {
    "one factor": (lambda a, b: {A: a}, "its other factor is missing"),
    "NaN": (lambda a, b: {A: a, B: b.clone().fill_(torch.nan)}, "not finite"),
    "infinite": (lambda a, b: {A: a, B: torch.full_like(b, 1e300, dtype=torch.float64)}, "not finite"),
    "another width": (lambda a, b: {A: a[:, :40], B: b}, "another base"),
    "another height": (lambda a, b: {A: a, B: b[:40]}, "another base"),
    "ranks that differ": (lambda a, b: {A: a, B: b[:, :3]}, "has room for"),
    "three dimensions": (lambda a, b: {A: a[None], B: b}, "has room for"),
    "integers": (lambda a, b: {A: a.int(), B: b}, "dtype I32"),
    "KaSA": (lambda a, b: {A: a, B: b, A.replace("lora_A.weight", "lora_diag"): torch.ones(4)}, "KaSA"),
    "unknown tensor": (lambda a, b: {A: a, B: b, f"{PREFIX}{Q}.lora_C": a}, "is not known"),
    "no such layer": (lambda a, b: {A.replace(".0.", ".7."): a, B.replace(".0.", ".7."): b}, "another base"),
    "no such module": (
        lambda a, b: {A.replace("q_proj", "x_proj"): a, B.replace("q_proj", "x_proj"): b},
        "no such part",
    ),
    "a norm": (lambda a, b: {A: a, B: b, f"{NORM}.weight": torch.ones(48)}, "no such part"),
    "a bias the base lacks": (
        lambda a, b: {A: a, B: b, f"{PREFIX}{Q}.base_layer.bias": torch.ones(48)},
        "has no bias there",
    ),
    "magnitude alone": (lambda a, b: {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(48)}, "no factors beside it"),
    "twice": (lambda a, b: {A: a, B: b, A.replace("A.weight", "A.default.weight"): a}, "stands twice"),
    "tokens nobody named": (
        lambda a, b: {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 48)},
        "names no tokens",
    ),
    "a larger vocabulary": (lambda a, b: {A: a, B: b, f"{PREFIX}lm_head.weight": torch.ones(220, 48)}, "has room for"),
    "copies alone": (lambda a, b: {f"{PREFIX}{Q}.base_layer.weight": torch.ones(48, 48)}, "changes nothing"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what: str, layers: AdaptedLayers, tmp_path: Path) -> None:
    make, told = TENSORS[what]
    good = factors(layers, 4, 0, [Q])
    directory = write(tmp_path / "mine", {name: value.contiguous() for name, value in make(good[A], good[B]).items()})
    text = refused(directory, layers)
    assert told in text
    assert what == "copies alone" or "tensor '" in text


def test_rank_above_the_limit(layers: AdaptedLayers, tmp_path: Path) -> None:
    directory = write(tmp_path / "mine", factors(layers, 4, 0, [Q]))
    assert "LoRA rank 4 is greater than max_lora_rank 3" in refused(directory, layers, max_rank=3)
    assert read_adapter(directory, layers, 4).rank == 4


def test_files_that_lie(layers: AdaptedLayers, tmp_path: Path) -> None:
    """A header that claims more than there is allocates nothing; what is cut off, or no file of the kind, is told."""
    directory = write(tmp_path / "mine", factors(layers, 4, 0, [Q]))
    path = directory / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = {A: {"dtype": "F32", "shape": [1 << 40, 48], "data_offsets": [0, (1 << 40) * 192]}}
    text = json.dumps(header).encode()
    for content in (
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", len(text)) + text + bytes(64),
        whole[: len(whole) // 2],
        whole[:5],
        b"",
        struct.pack("<Q", 2) + b"{}",
    ):
        path.write_bytes(content)
        refused(directory, layers)
    path.unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(directory, layers)
    (directory / "adapter_config.json").write_text("[" * 100_000)
    assert "no JSON object" in refused(directory, layers)
    (directory / "adapter_config.json").unlink()
    assert "cannot be read" in refused(directory, layers)
    refused(tmp_path / "nothing there", layers)


def test_files_that_change_while_they_are_read(
    layers: AdaptedLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "mine", factors(layers, 4, 0, [Q]))
    get = Tensors.get

    def get_and_write(self: Tensors, name: str) -> Tensor:
        value = get(self, name)
        write(directory, factors(layers, 4, 1, [Q]))
        return value

    monkeypatch.setattr(Tensors, "get", get_and_write)
    assert "changed while they were read" in refused(directory, layers)


def test_pickled_files(layers: AdaptedLayers, tmp_path: Path) -> None:
    """adapter_model.bin of older versions reads alike, and only tensors are read of it."""
    directory = write(tmp_path / "mine", factors(layers, 4, 0, [Q]))
    expected = read_adapter(directory, layers, 16)
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    path = directory / "adapter_model.bin"
    torch.save(tensors, path)
    got = read_adapter(directory, layers, 16)
    assert got.num_bytes == expected.num_bytes and got.branches.keys() == expected.branches.keys()
    for bad in ({A: print}, {A: tensors[A][:, :1].expand(4, 1 << 40), B: tensors[B]}, [tensors[A]], {A: 3}):
        torch.save(bad, path)
        refused(directory, layers)
    path.write_bytes(b"\x80\x02}q\x00.")
    refused(directory, layers)
    torch.save(tensors, path)
    packed = tmp_path / "packed"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path.write_bytes(packed.read_bytes())
    assert "compressed" in refused(directory, layers)


def test_names_as_others_write_them(layers: AdaptedLayers, tmp_path: Path) -> None:
    """Without peft's prefix, with the adapter's own name, and under the wrappers of other classes: one module."""
    tensors = factors(layers, 4, 0, [Q])
    for change in (
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace("model.layers", "language_model.model.layers"),
    ):
        directory = write(tmp_path / "mine", {change(name): value for name, value in tensors.items()})
        assert list(read_adapter(directory, layers, 16).branches) == [Q]
    towers = {name.replace("model.layers", "model.vision_tower.layers"): value for name, value in tensors.items()}
    refused(write(tmp_path / "tower", towers), layers)


def test_what_a_config_may_leave_out(layers: AdaptedLayers, tmp_path: Path) -> None:
    tensors = factors(layers, 8, 0, [Q])
    directory = tmp_path / "mine"
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    weights = read_adapter(directory, layers, 16)
    assert weights.rank == 8 and weights.base_model_name == "" and SIZES["hidden_size"] == 48
