"""Quantised checkpoints and GGUF files whose weights stay codes on a GPU: read and packed as there, by torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import StartupError
from engine.models.gguf.coded import CODED, coded
from engine.models.gguf.dequantise import DEQUANTISED, dequantise
from engine.models.gguf.reader import open_gguf
from engine.models.gguf.types import BY_NAME
from engine.ops import device_coded, native
from engine.ops.device_coded import FORMS, Codes, DeviceCodedLinear, torch_numbers
from tests.models import quantised as write
from tests.models.gguf.export import export
from tests.models.gguf.test_packed import CASES, SIZES
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_quantised import FORMATS, check_logits, groups, layers, plain, quantise
from tests.models.test_quantised import SIZES as LAYERS

__all__ = ["plain"]

# Of eight layers how many stay codes, where that is not all of them: groups that are no multiple of 32 columns, or
# of rows.
KEPT = {
    "w2": 0, "fp8-block": 0, "fp8": 0, "modelopt-int4": 0, "hqq-3": 6, "hqq-2-across": 0, "hqq-4-flat": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: FORMS)
    with native.disabled():
        yield


def kept(model: Any) -> list[DeviceCodedLinear]:
    return [linear for linear in model.linears if isinstance(linear, DeviceCodedLinear)]


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, plain: tuple[Path, Any], tmp_path: Path) -> None:
    config, writer, _ = FORMATS[name]
    model = check_logits(quantise(plain, tmp_path, config, layers(writer)), tmp_path)
    assert len(kept(model)) == KEPT.get(name, 8)


INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("fp8-row", {}, 0),
        ("fp8-row", INPUTS, 8),
        ("fp8-tensor", {**INPUTS, "strategy": "tensor", "dynamic": False}, 8),
        ("fp8-row", {**INPUTS, "type": "int"}, 0),
        ("w8a16-row", INPUTS, 0),
        ("mxfp8", INPUTS, 0),
        ("fbgemm", {}, 8),
        ("modelopt-fp8", {}, 8),
        ("modelopt-row", {}, 8),
    ],
)
def test_inputs_of_float8(
    name: str,
    changes: dict[str, Any],
    expected: int,
    plain: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the checkpoint is for them, and a row of the weight has one scale: the logits of many rows are near."""
    monkeypatch.setattr(device_coded, "has_scaled_product", lambda dtype, device: True)
    config, writer, _ = FORMATS[name]
    if changes:
        group = {**config["config_groups"]["group_0"], "input_activations": changes}
        config = {**config, "config_groups": {"group_0": group}}
    quantise(plain, tmp_path, config, layers(writer))
    assert not any(each.has_float8_inputs for each in kept(load(tmp_path)))
    model = load(tmp_path, packed_input_bits=8)
    rounded = [each for each in kept(model) if each.has_float8_inputs]
    assert len(rounded) == expected
    [prompt] = prompts_of([20])
    for linear in rounded:
        linear.float8_from = None
    wide = Runner(model).logits(prompt, 20)
    for linear in rounded:
        linear.float8_from = 16
    error = float((Runner(model).logits(prompt, 20) - wide).norm() / wide.norm())
    assert error == 0 if not expected else 1e-3 < error < 0.15


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rounded_as_they_are_read(kind: str, plain: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the model that is rounded and then widened; the head is among them."""
    model = load(plain[0], quantisation=kind)
    assert len(kept(model)) == 9
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: ())
    wide = load(plain[0], quantisation=kind)
    [prompt] = prompts_of([20])
    assert relative_error(Runner(model).logits(prompt, 8), Runner(wide).logits(prompt, 8)) <= 1e-5


def test_tied_and_quantised(tmp_path: Path) -> None:
    """The rows of the embedding are of the same codes."""
    (tmp_path / "plain").mkdir()
    reference = make_checkpoint(tmp_path / "plain", "Llama", **LAYERS, tie_word_embeddings=True)
    config = groups(num_bits=8, group_size=32)
    model = quantise(
        (tmp_path / "plain", reference), tmp_path / "to", config, lambda _, w: write.pack_quantized(8, 32)(w)
    )
    assert isinstance(check_logits(model, tmp_path / "to").linears[-1], DeviceCodedLinear)


@pytest.mark.parametrize("name", CASES)
def test_gguf_files_of_mixed_types(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, blocks, kinds = CASES[name]
    make_checkpoint(tmp_path, "Llama", **{**SIZES, **sizes})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks=blocks)
    model = load(path)
    # A fused layer of two types, whose rows are reordered, becomes numbers.
    assert len(kept(model)) >= sum(kinds.values()) - 2 * 3
    [prompt] = prompts_of([20])
    found = Runner(model).logits(prompt, 8)
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: ())
    expected = Runner(load(path)).logits(prompt, 8)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("kind", CODED)
def test_codes_are_the_blocks_numbers(kind: str) -> None:
    assert set(CODED) == set(DEQUANTISED)
    block, generator = BY_NAME[kind], np.random.default_rng(0)
    blocks = generator.integers(0, 256, (24, block.size), np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ2_0": (64,)}.get(
        kind, (0, 2) if kind.endswith("_1") else (0,)
    ):
        blocks[:, at : at + 2] = generator.normal(size=(24, 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(0, 200, 24)
    expected = np.empty((24, block.elements), np.float32)
    dequantise(kind, blocks, expected)
    codes, scale, low = coded(kind, blocks)
    form, group = CODED[kind]
    assert codes.dtype == np.uint8 and codes.shape == expected.shape and scale.shape[1] == block.elements // group
    added = None if low is None else torch.from_numpy(low.T.copy())
    given = Codes(
        form, torch.from_numpy(codes), torch.from_numpy(scale.T.copy()), added, block.elements, min(group, 32)
    )
    assert torch.equal(torch_numbers(given, torch.float32), torch.from_numpy(expected))


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "num_hidden_layers": 1})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks={"ffn_down": "Q6_K"})
    place = open_gguf(path).tensors["blk.0.ffn_down.weight"].begin
    data = bytearray(path.read_bytes())
    data[place + 208 : place + 210] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(StartupError, match="block 0 has a scale that is not a finite number"):
        load(path)
