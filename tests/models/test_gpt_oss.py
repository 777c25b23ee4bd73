"""gpt-oss as it is published: experts in MXFP4, which stay in four bits, against transformers on the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from engine.models.parts import experts
from engine.models.registry import read_spec
from engine.ops.mxfp4 import dequantised
from engine.ops.packed import PackedLinear
from tests.models.support import Runner, compare, edit_json, load, make_checkpoint, prompts_of, relative_error

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "sliding_window": 9,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model, and its directory with blocks and scales."""
    directory = tmp_path_factory.mktemp("gpt-oss")
    reference = make_checkpoint(directory, "GptOss", **SIZES)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    weights = dict(reference.named_parameters())
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, into, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, out, into // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (count, out, into // 32), generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            weights[name].copy_(dequantised(blocks, scales, torch.float32).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path, {"format": "pt"})
    edit_json(directory / "config.json", quantization_config=MXFP4)
    return reference, directory


def test_matches_transformers(published: tuple[Any, Path]) -> None:
    reference, directory = published
    compare(reference, directory, limit=1e-3)  # experts take inputs of 16 bits
    matrices = [each for layer in load(directory)._layers for each in layer.mlp._experts]  # type: ignore[attr-defined]
    assert len(matrices) == 15 and all(isinstance(each._gate_up, PackedLinear) for each in matrices)


def test_as_a_gpu_computes_it(published: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without counts on the host: every expert, by its share."""
    reference, directory = published
    monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)
    prompt = prompts_of([21])[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(load(directory)).logits(prompt, 8), expected) <= 1e-4


def test_bfloat16_stays_near_float32(published: tuple[Any, Path]) -> None:
    _, directory = published
    prompt = prompts_of([40])[0]
    wide = Runner(load(directory)).logits(prompt, 16)
    narrow = Runner(load(directory, torch.bfloat16), dtype=torch.bfloat16).logits(prompt, 16)
    # Of random experts two may be close to each other, and then a token goes another way.
    assert float((narrow - wide).abs().median() / wide.abs().max()) < 0.02


def test_random_weights(published: tuple[Any, Path]) -> None:
    """--load-format dummy: numbers near size 1, in four bits as well."""
    model = load(published[1], load_format="dummy")
    logits = Runner(model).logits(prompts_of([9])[0], 9)
    assert torch.isfinite(logits).all() and 0.01 < float(logits.std()) < 100


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 48}, "hidden_size (48) must be a multiple of 32"),
        ({"intermediate_size": 40}, "intermediate_size (40) must be a multiple of 32"),
        ({"swiglu_limit": 0}, "swiglu_limit must be a finite number above 0"),
        ({"quantization_config": {"quant_method": "aqlm"}}, 'quantization_config ("aqlm") is not supported'),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            'quantization_config ("mxfp4") is not supported',
        ),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types must hold full_attention or sliding_attention"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok (6) must not exceed num_local_experts (5)"),
    ],
)
def test_bad_fields(published: tuple[Any, Path], tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes((published[1] / "config.json").read_bytes())
    edit_json(path, **changes)
    with pytest.raises(StartupError) as error:
        read_spec(tmp_path)
    assert problem in str(error.value) and str(path) in str(error.value)


def test_an_exponent_that_is_no_number(published: tuple[Any, Path], tmp_path: Path) -> None:
    _, directory = published
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.down_proj_scales"
    tensors = load_file(path)
    tensors[name].view(-1)[7] = 255
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StartupError, match=f": tensor {name}: a scale is no finite number$"):
        load(tmp_path)


@pytest.mark.parametrize("ending", ["_blocks", "_scales", "_bias"])
def test_damaged_tensors(published: tuple[Any, Path], tmp_path: Path, ending: str) -> None:
    """One that is missing, one of another shape, one of another type."""
    _, directory = published
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    name = f"model.layers.1.mlp.experts.down_proj{ending}"
    for change, problem in (
        (None, "is missing"),
        (tensors[name][:, :-1].contiguous(), "has shape"),
        (tensors[name].to(torch.int32), "has dtype I32"),
    ):
        others = {key: each for key, each in tensors.items() if key != name}
        save_file(others if change is None else {**others, name: change}, tmp_path / "model.safetensors")
        with pytest.raises(StartupError, match=problem):
            load(tmp_path)
