"""Experts of checkpoints and GGUF files that stay codes on a GPU: read and stacked as there, by torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.parts import experts
from engine.ops import device_coded, native
from engine.ops.device_coded import FORMS
from tests.models import quantised as write
from tests.models.gguf.export import export
from tests.models.support import Runner, edit_json, load, make_checkpoint, prompts_of, relative_error
from tests.models.test_gpt_oss import published
from tests.models.test_quantised import groups

__all__ = ["published"]

SMALL: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 96, "num_hidden_layers": 2}
QWEN = {**SMALL, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 16}
DEEPSEEK: dict[str, Any] = {
    **SMALL, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: FORMS)
    with native.disabled():
        yield


def check(path: Path, monkeypatch: pytest.MonkeyPatch, forms: list[str], **options: Any) -> None:
    """The logits of the same numbers that are no codes."""
    model = load(path, **options)
    assert [mixture.forms for mixture in model.mixtures] == [forms] * len(model.mixtures) and model.mixtures
    [prompt] = prompts_of([20])
    ours = Runner(model).logits(prompt, 8)
    monkeypatch.setattr(device_coded, "forms_kept", lambda dtype, device: ())
    wide = load(path, **options)
    assert not any(mixture.forms for mixture in wide.mixtures)
    assert relative_error(ours, Runner(wide).logits(prompt, 8)) <= 1e-4


def quantised(path: Path, config: dict[str, Any], writer: write.Writer, *, but: str = "-") -> None:
    """The experts' matrices as `writer` has them, but those with this in their names."""
    tensors = load_file(path / "model.safetensors")
    for name, weight in list(tensors.items()):
        if ".experts." in name and name.endswith(".weight") and but not in name:
            del tensors[name]
            tensors |= {
                name.removesuffix(".weight") + end: each.contiguous() for end, each in writer(weight)[0].items()
            }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", quantization_config=config)


@pytest.mark.parametrize(
    ("config", "writer", "form"),
    [
        (groups(group_size=32), write.pack_quantized(4, 32), "int4"),
        (groups(group_size=32, symmetric=False), write.pack_quantized(4, 32, zero=True), "int4 and low"),
        (groups(num_bits=8, strategy="channel"), write.pack_quantized(8, None), "int8"),
        (groups(type="float", group_size=32), write.mxfp4, "e2m1"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, write.awq, "int4 and low"),
    ],
)
def test_one_by_one(
    config: dict[str, Any], writer: write.Writer, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, "Qwen3Moe", **QWEN)
    quantised(tmp_path, config, writer)
    check(tmp_path, monkeypatch, [form, form])


def test_float8_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "DeepseekV3", **DEEPSEEK)
    quantised(tmp_path, FP8, write.float8((32, 32), ".weight_scale_inv"))
    check(tmp_path, monkeypatch, ["e4m3", "e4m3"])


def test_some_that_have_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of the same layer have none."""
    make_checkpoint(tmp_path, "Qwen3Moe", **QWEN)
    with_zeros, without = write.pack_quantized(4, 32, zero=True), write.pack_quantized(4, 32)
    config, other = groups(group_size=32, symmetric=False), groups(group_size=32)["config_groups"]["group_0"]
    config["config_groups"]["group_0"]["targets"] = ["re:.*experts[.][02-9][.].*"]
    config["config_groups"]["group_1"] = {**other, "targets": ["re:.*[.]1[.].*"]}
    quantised(tmp_path, config, with_zeros, but=".experts.1.")
    quantised(tmp_path, config, without)
    check(tmp_path, monkeypatch, ["int4 and low", "int4 and low"])


@pytest.mark.parametrize("but", ["down_proj", ".3.up_proj"])
def test_some_that_are_floats(but: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of one expert that is another kind of number makes numbers of all that are stacked with it."""
    make_checkpoint(tmp_path, "Qwen3Moe", **QWEN)
    config = groups(group_size=32)
    config["ignore"] = ["lm_head", f"re:.*{but.replace('.', '[.]')}.*"]
    quantised(tmp_path, config, write.pack_quantized(4, 32), but=but)
    check(tmp_path, monkeypatch, ["int4"])


def test_columns_in_another_order_become_numbers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Qwen3Moe", **QWEN)
    quantised(tmp_path, groups(group_size=32, actorder="group"), write.pack_quantized(4, 32, shuffled=True))
    assert [mixture.forms for mixture in load(tmp_path).mixtures] == [[], []]


@pytest.mark.parametrize(("kind", "form"), [("int8", "int8"), ("int4", "int4"), ("fp8", "e4m3")])
def test_rounded_as_they_are_read(kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "Qwen3Moe", **QWEN)
    check(tmp_path, monkeypatch, [form, form], quantisation=kind)


def test_gpt_oss(published: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers: gates apart from what they multiply, with biases and the clamped activation."""
    reference, directory = published
    model = load(directory)
    assert [mixture.forms for mixture in model.mixtures] == [["e2m1", "e2m1"]] * 3
    [prompt] = prompts_of([21])
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(model).logits(prompt, 8), expected) <= 1e-4
    # And random weights.
    logits = Runner(load(directory, load_format="dummy")).logits(prompt, 9)
    assert torch.isfinite(logits).all() and 0.01 < float(logits.std()) < 100


def test_gpt_oss_in_floats(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "GptOss", **{**SMALL, "num_local_experts": 5, "num_experts_per_tok": 2})
    model = load(tmp_path)
    assert len(model.mixtures) == 2 and not model.mixtures[0].forms
    [prompt] = prompts_of([21])
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(model).logits(prompt, 8), expected) <= 1e-4


def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**QWEN, "hidden_size": 256, "moe_intermediate_size": 256}
    make_checkpoint(tmp_path, "Qwen3Moe", **sizes)
    blocks = {"ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K", "ffn_down_exps": "Q6_K"}
    path = export(tmp_path, tmp_path / "a.gguf", "qwen3moe", {}, blocks=blocks)
    check(path, monkeypatch, ["int4 and low", "int8"])
