"""Quantised checkpoints: the logits of the numbers that they stand for, and one line for what is wrong with one."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import StartupError
from engine.models.fields import Fields
from engine.models.loading.checkpoint import read_header
from engine.models.loading.schemes.base import Mismatch
from engine.models.loading.schemes.resolve import with_quantised
from engine.models.loading.schemes.rounding import rounded, rounded_float8
from engine.models.loading.weights import CheckpointWeights
from engine.models.loading.writing import write_quantised
from engine.models.quantisation import quantisation_of, rounded_to
from engine.models.spec import Quantisation
from engine.ops.coded import CodedLinear, can_keep_codes
from engine.ops.packed import PackedLinear
from tests.models import quantised as write
from tests.models.support import Runner, edit_json, load, make_checkpoint, prompts_of, relative_error

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = prompts_of([19])[0]


def groups(**weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.19.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "group_size": 32}
# Of each: config.json's field, how a weight is written, how many of eight layers keep what is stored (groups that are
# of blocks of 32, not of a flat weight, and codes that kernels know).
FORMATS: dict[str, tuple[dict[str, Any], write.Writer, int]] = {
    "w4a16": (groups(group_size=32, strategy="group"), write.pack_quantized(4, 32), 8),
    "w4a16-zero": (groups(group_size=32, symmetric=False), write.pack_quantized(4, 32, zero=True), 8),
    "w4a16-shuffled": (groups(group_size=32, actorder="group"), write.pack_quantized(4, 32, shuffled=True), 8),
    "w8a16-row": (groups(num_bits=8, strategy="channel"), write.pack_quantized(8, None), 8),
    "w8a16-zero": (groups(num_bits=8, group_size=32), write.pack_quantized(8, 32, zero=True), 8),
    "w3": (groups(num_bits=3, group_size=32), write.pack_quantized(3, 32), 8),
    "w5-gaps": (groups(num_bits=5, group_size=32), write.pack_quantized(5, 32, gaps=True, zero=True), 8),
    "w2": (groups(num_bits=2, group_size=16), write.pack_quantized(2, 16), 0),
    "w8a8": (groups(num_bits=8, strategy="channel"), write.int_quantized(8, None), 8),
    "w4a8": (groups(group_size=32, strategy="group"), write.int_quantized(4, 32), 8),
    "fp8-tensor": (groups(num_bits=8, type="float"), write.float8(None, shape=lambda _: (1,)), 8),
    "fp8-row": (groups(num_bits=8, type="float", strategy="channel"), write.float8((1, 0)), 8),
    "fp8-block": (
        groups(num_bits=8, type="float", strategy="block", block_structure=[20, 36]),
        write.float8((20, 36)),
        0,
    ),
    "mxfp8": (groups(num_bits=8, type="float", group_size=32), write.float8((1, 32), exponents=True), 8),
    "nvfp4": (groups(type="float", group_size=16), write.nvfp4(divides=True), 8),
    "mxfp4": (groups(type="float", group_size=32), write.mxfp4, 8),
    "mxfp4-typed": (groups(type="float", group_size=32), write.as_float4(write.mxfp4, ".weight_packed"), 8),
    "gptq-2": ({**GPTQ, "bits": 2}, write.gptq(2, 32), 8),
    "gptq-3": ({**GPTQ, "bits": 3}, write.gptq(3, 32, zero=True), 8),
    "gptq-4": ({**GPTQ, "bits": 4}, write.gptq(4, 32, negative=True), 8),
    "gptq-4-zero": ({**GPTQ, "bits": 4}, write.gptq(4, 32, zero=True), 8),
    "gptq-4-shuffled": ({**GPTQ, "bits": 4, "desc_act": True}, write.gptq(4, 32, zero=True, shuffled=True), 8),
    "gptq-8": ({**GPTQ, "bits": 8}, write.gptq(8, 32), 8),
    "gptq-v2": ({**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}, write.gptq(4, 32, offset=0, zero=True), 8),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, write.awq, 8),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round"},
        write.without(write.gptq(4, 32, offset=0, zero=True), ".g_idx"),
        8,
    ),
    "auto-round-gptq": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
        write.without(write.gptq(4, 32, negative=True), ".g_idx"),
        8,
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [20, 36]}, write.float8((20, 36), ".weight_scale_inv"), 0),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, write.float8((1, 0)), 8),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, write.float8(None, shape=lambda _: ()), 8),
    "modelopt-row": ({"quant_method": "modelopt"}, write.float8((1, 0), shape=lambda grid: (grid[0],)), 8),
    "modelopt-block": (
        {"quant_method": "modelopt"},
        write.float8((128, 128), shape=lambda grid: (grid[0], 1, grid[1], 1)),
        8,
    ),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, write.nvfp4(divides=False), 8),
    "modelopt-int4": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, write.modelopt_int4, 0),
    "bnb-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, write.bnb_int8, 8),
    "bnb-4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, write.bnb_nf4(nested=False), 8),
    "bnb-4-nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, write.bnb_nf4(nested=True), 8),
    "torchao-8": ({"quant_method": "torchao"}, write.torchao(None), 8),
    "torchao-groups": ({"quant_method": "torchao"}, write.torchao(32), 8),
    "hqq-4": ({"quant_method": "hqq"}, write.hqq(4, 32), 8),
    "hqq-3": ({"quant_method": "hqq"}, write.hqq(3, 64), 6),
    "hqq-2-across": ({"quant_method": "hqq"}, write.hqq(2, 128, axis=1), 0),
    "hqq-4-flat": ({"quant_method": "hqq"}, write.hqq(4, 64, axis=0), 0),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("plain")
    return directory, make_checkpoint(directory, "Llama", **SIZES)


def quantise(
    plain: tuple[Path, Any], to: Path, config: dict[str, Any], writer: Callable[[str, Tensor], write.Written | None]
) -> Any:
    """A copy of the checkpoint whose weights are as `writer` has them; returns the model that it means."""
    directory, reference = plain
    shutil.copytree(directory, to, dirs_exist_ok=True)
    reference = copy.deepcopy(reference)
    parameters = dict(reference.named_parameters())
    tensors = load_file(to / "model.safetensors")
    for name, weight in list(tensors.items()):
        module = name.removesuffix(".weight")
        written = writer(module, weight) if name.endswith(".weight") and weight.dim() == 2 else None
        if written is None:
            continue
        del tensors[name]
        tensors |= {module + suffix: tensor.contiguous() for suffix, tensor in written[0].items()}
        with torch.no_grad():
            parameters[name].copy_(written[1])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    edit_json(to / "config.json", quantization_config=config)
    return reference


def layers(writer: write.Writer) -> Callable[[str, Tensor], write.Written | None]:
    return lambda module, weight: writer(weight) if module.endswith(KINDS) else None


def check_logits(reference: Any, directory: Path, **options: Any) -> Any:
    model = load(directory, **options)
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS])).logits[0]
    error = relative_error(Runner(model).logits(IDS, 8), expected)
    # Inputs of packed layers are rounded to sixteen bits.
    most = 3e-4 if any(isinstance(linear, PackedLinear) for linear in model.linears) else 1e-4
    assert error <= most, f"logits differ by {error:.1e}"
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, plain: tuple[Path, Any], tmp_path: Path) -> None:
    config, writer, keeps = FORMATS[name]
    model = check_logits(quantise(plain, tmp_path, config, layers(writer)), tmp_path)
    if can_keep_codes(torch.float32, torch.device("cpu")):
        assert sum(isinstance(linear, CodedLinear | PackedLinear) for linear in model.linears) == keeps


def test_every_layer_in_its_own_way(plain: tuple[Path, Any], tmp_path: Path) -> None:
    """Parts of a fused layer in other bits, or in none; a head; a group that means nothing, a name that is no one's."""
    config = groups(group_size=32)
    config["format"] = "mixed-precision"
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    config["config_groups"] |= {
        "group_1": {"targets": [r"re:.*layers\.1\.mlp.*", "lm_head"], "weights": eight},
        "group_2": {"targets": ["model.layers.0.self_attn.v_proj"], "weights": {**eight, "num_bits": 3}},
        "group_3": {"targets": ["re:nothing"], "weights": {"num_bits": 2}},
        "group_4": {"targets": ["Attention"], "weights": None, "input_activations": {"num_bits": 8}},
    }
    config["ignore"] = ["model.layers.7.mlp", "re:.*vision.*", "model.layers.1.self_attn.k_proj"]

    def writer(module: str, weight: Tensor) -> write.Written | None:
        if module.endswith("layers.1.self_attn.k_proj") or "embed" in module:
            return None
        if "layers.1.mlp" in module or module == "lm_head":
            return write.pack_quantized(8, None)(weight)
        if module.endswith("layers.0.self_attn.v_proj"):
            return write.pack_quantized(3, None)(weight)
        return write.pack_quantized(4, 32)(weight)

    check_logits(quantise(plain, tmp_path, config, writer), tmp_path)


def test_tied_and_quantised(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    reference = make_checkpoint(tmp_path / "plain", "Llama", **SIZES, tie_word_embeddings=True)
    config = groups(num_bits=8, group_size=32)
    model = quantise(
        (tmp_path / "plain", reference), tmp_path / "to", config, lambda _, w: write.pack_quantized(8, 32)(w)
    )
    check_logits(model, tmp_path / "to")


def test_scales_that_are_not_used(plain: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of a cache in eight bits, which is told; those of activations. A bias of zeros where the model has none."""
    config, writer, _ = FORMATS["gptq-4"]
    reference = quantise(plain, tmp_path, config, layers(writer))
    more = {f"model.layers.{n}.self_attn.{kind}_scale": torch.ones(1) for n in range(2) for kind in "kv"}
    more |= {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}
    more |= {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    check_logits(reference, tmp_path)
    assert "4 scales for keys and values in eight bits are not used" in caplog.text
    save_file({**load_file(path), "model.layers.0.mlp.up_proj.bias": torch.ones(96)}, path, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"tensor model.layers.0.mlp.up_proj.bias is not part of the model"):
        load(tmp_path)


MODULE = "model.layers.1.mlp.up_proj"


def replaced(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[MODULE + suffix] = change(tensors[MODULE + suffix].clone()).contiguous()

    return damage


def removed(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(MODULE + suffix)


def set_at(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


NAMED = f"tensor {MODULE}.weight "
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], dict[str, Any], str]] = {
    "bits": ("w4a16", nothing, groups(num_bits=8), "num_bits in quantization_config is 8, which takes 24 words a row"),
    "group": ("w4a16", nothing, groups(group_size=64), "has scales for 3 groups; groups of 64 among 96 columns are 2"),
    "no-scale": ("w4a16", removed(".weight_scale"), {}, f"tensor {MODULE}.weight_scale is missing"),
    "no-shape": ("w4a16", removed(".weight_shape"), {}, f"tensor {MODULE}.weight_shape is missing"),
    "shape": (
        "w4a16",
        replaced(".weight_shape", set_at(0, 95)),
        {},
        "weight_shape [95, 64] does not fit weight_packed",
    ),
    "huge": ("w4a16", replaced(".weight_shape", set_at(1, 2**60)), {}, NAMED + "(compressed-tensors): num_bits"),
    "nan": ("w4a16", replaced(".weight_scale", set_at(5, torch.nan)), {}, NAMED + "(int4 by 32): a scale is no finite"),
    "zero": ("w8a8", replaced(".weight_scale", set_at(5, 0)), {}, "(int8 by row): a scale is zero where its weights"),
    "range": ("w4a8", replaced(".weight", set_at(5, 99)), {}, "has numbers beyond 4 bits"),
    "columns": ("w4a16-shuffled", replaced(".weight_g_idx", set_at(5, 2)), {}, "its g_idx must name one of 2 groups"),
    "floats": ("w8a8", replaced(".weight", Tensor.float), {}, "has scales beside numbers in F32"),
    "ignored": (
        "w4a16",
        nothing,
        {**groups(), "ignore": [r"re:.*1\.mlp.up"]},
        f"ignore in quantization_config names {MODULE}",
    ),
    "pattern": (
        "w4a16",
        nothing,
        {**groups(), "ignore": ["re:("]},
        "'(' in quantization_config is no regular expression",
    ),
    "nobody": ("w4a16", nothing, {**groups(), "config_groups": {}}, "no config_groups in quantization_config name it"),
    "sparse": (
        "w4a16",
        nothing,
        {**groups(), "sparsity_config": {"format": "sparse-24"}},
        'sparsity_config.format ("sparse-24")',
    ),
    "turned": (
        "w4a16",
        nothing,
        {**groups(), "transform_config": {"config_groups": {"a": {"apply": [{"location": "input"}]}}}},
        'transform_config ("input") is not supported',
    ),
    "block": (
        "fp8-block",
        nothing,
        groups(type="float", strategy="block", block_structure=[0]),
        "block_structure must be",
    ),
    "blocks": ("fp8-block", replaced(".weight_scale", lambda each: each[1:]), {}, "its weight asks for [5, 2]"),
    "fp8-nan": (
        "fp8-row",
        replaced(".weight", lambda each: each.view(torch.uint8).fill_(127).view(each.dtype)),
        {},
        "a weight is no finite",
    ),
    "fp8-large": ("fp8-row", replaced(".weight_scale", set_at(3, 200)), {}, f"tensor {MODULE}.weight: a scale is 200,"),
    "fp8-zero": ("fp8-row", replaced(".weight_scale", set_at(3, 0)), {}, "a scale is zero where its weights are not"),
    "global": (
        "nvfp4",
        replaced(".weight_global_scale", set_at(0, 0)),
        {},
        "its global scale is zero or no finite number",
    ),
    "exponent": ("mxfp4", replaced(".weight_scale", set_at(0, 255)), {}, "(MXFP4): a scale is no finite number"),
    "gptq-bits": ("gptq-4", nothing, {**GPTQ, "bits": 8}, "has 4 bits, where quantization_config says 8"),
    "gptq-group": ("gptq-4", nothing, {**GPTQ, "bits": 4, "group_size": 16}, "groups of 16 among 96 columns are 6"),
    "gptq-marlin": (
        "gptq-4",
        nothing,
        {**GPTQ, "checkpoint_format": "marlin"},
        'checkpoint_format ("marlin") is not one of',
    ),
    "gptq-left-out": (
        "gptq-4",
        nothing,
        {**GPTQ, "bits": 4, "dynamic": {r"-:.*\.1\.mlp\.up": {}}},
        f"leaves {MODULE} out",
    ),
    "gptq-columns": ("gptq-4-shuffled", replaced(".g_idx", set_at(0, -1)), {}, "its g_idx must name one of 2 groups"),
    "gptq-zeros": ("gptq-4", replaced(".qzeros", lambda each: each[:, 1:]), {}, f"{MODULE}.qzeros has shape [2, 11]"),
    "awq-gemv": (
        "awq",
        nothing,
        {"quant_method": "awq", "version": "gemv"},
        'version ("gemv") is not supported; gemm is',
    ),
    "awq-bits": ("awq", nothing, {"quant_method": "awq", "bits": 8}, "AWQ is read in 4 bits"),
    "packing": (
        "auto-round",
        nothing,
        {"quant_method": "auto-round", "packing_format": "x"},
        'packing_format ("x") is not one of',
    ),
    "state": ("bnb-4", replaced(".weight.quant_state.bitsandbytes__nf4", set_at(0, 65)), {}, "is not valid JSON"),
    "largest": ("bnb-4", replaced(".weight.absmax", set_at(0, torch.inf)), {}, "a scale is no finite number"),
    "hqq-bits": ("hqq-4", replaced(".nbits", set_at(0, 5)), {}, "has 5 bits along axis 1"),
    "before": ("modelopt-int4", replaced(".pre_quant_scale", set_at(0, torch.nan)), {}, "a scale is no finite number"),
    "torchao-kind": (
        "torchao-8",
        replaced("._weight_qdata", lambda each: each.view(torch.uint8)),
        {},
        "is a tensor in U8; only",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages(name: str, plain: tuple[Path, Any], tmp_path: Path) -> None:
    kind, damage, config, expected = DAMAGES[name]
    given, writer, _ = FORMATS[kind]
    quantise(plain, tmp_path, config or given, layers(writer))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rounded_as_they_are_read(kind: str, plain: tuple[Path, Any]) -> None:
    directory, reference = plain
    reference = copy.deepcopy(reference)
    for name, weight in reference.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            bits = 8 if kind == "int8" or "lm_head" in name else 4
            if kind == "fp8":
                codes, scales = rounded_float8(weight.detach())
                codes = codes.float()
            else:
                codes, scales = rounded(weight.detach().view(-1, 32), bits, torch.float16, signs=True)
            with torch.no_grad():
                weight.copy_((codes * scales[:, None]).view(weight.shape))
    model = check_logits(reference, directory, quantisation=kind)
    if can_keep_codes(torch.float32, torch.device("cpu")):
        assert sum(isinstance(linear, CodedLinear | PackedLinear) for linear in model.linears) == 9


@pytest.mark.parametrize(
    ("scheme", "group"), [("int4", None), ("int4", 32), ("int8", None), ("int8", 32), ("fp8", None)]
)
def test_what_is_written_is_read(scheme: str, group: int | None, plain: tuple[Path, Any], tmp_path: Path) -> None:
    """Groups of several sizes, for 64 does not divide 96; and the bytes are those of the format."""
    directory, reference = plain
    reference = copy.deepcopy(reference)
    done = write_quantised(directory, tmp_path / "out", scheme, group)
    assert (done.rounded, done.kept) == (14, 2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert done.after == sum(tensor.nbytes for tensor in tensors.values()) < done.before
    for name, weight in reference.named_parameters():
        if weight.dim() != 2 or "layers" not in name:
            continue
        rows, columns = weight.shape
        if scheme == "fp8":
            meant = tensors[name].float() * tensors[f"{name}_scale"].float()
        else:
            size = group or (64 if columns == 64 else 32)
            bits = int(scheme[3:])
            codes, scales = rounded(weight.detach().reshape(-1, size), bits, torch.bfloat16, signs=False)
            stored = codes.long().view(rows, columns) + (1 << (bits - 1))
            assert torch.equal(tensors[f"{name}_packed"], write.stream(stored, bits))
            meant = (codes * scales[:, None]).view(rows, columns)
        assert 0 < (meant - weight).abs().max() < (0.2 if scheme == "int4" else 0.05)
        with torch.no_grad():
            weight.copy_(meant)
    check_logits(reference, tmp_path / "out")
    for source, to, expected in (
        (tmp_path / "out", tmp_path / "again", "only a directory of safetensors that is not quantised"),
        (directory, tmp_path / "out", "is there already"),
    ):
        with pytest.raises(StartupError, match=expected):
            write_quantised(source, to, scheme)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_leave_little_error(bits: int, signs: bool) -> None:
    weights = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    codes, scales = rounded(weights, bits, torch.float16, signs=signs)
    end = 1 << (bits - 1)
    assert int(codes.min()) >= -end and int(codes.max()) < end and torch.equal(scales.half().float(), scales)
    error = (codes * scales[:, None] - weights).square().mean()
    whole = weights.abs().amax(1, keepdim=True) / (end - 0.5)
    simple = torch.where(whole == 0, 0.0, (weights / whole).round().clamp(-end, end - 1) * whole)
    assert error < (simple - weights).square().mean() * (0.9 if bits == 4 else 1.02)
    assert signs or bool((scales >= 0).all())
    with pytest.raises(Mismatch, match="no finite number"):
        rounded(torch.full((1, 32), torch.nan), bits, torch.float16, signs=signs)


@pytest.mark.parametrize(
    ("asked", "method", "expected"),
    [
        ("auto", "awq", None),
        ("auto", None, None),
        ("int4", None, "int4"),
        ("awq", "awq", None),
        ("auto_round", "auto-round", None),
        ("int8", "awq", "--quantization int8: DIR is quantised already, by awq"),
        ("gptq", "awq", "--quantization gptq: DIR is quantised by awq"),
        ("fp8", None, "fp8"),
        ("fp8", "fp8", None),
        ("fp8", "awq", "--quantization fp8: DIR is quantised already, by awq"),
        ("gptq", None, "--quantization gptq: DIR is not quantised; as it is read, it can become int8, int4 or fp8"),
        ("int3", None, "--quantization 'int3' is none of auto, int8, int4, fp8, auto-round, awq, "),
    ],
)
def test_what_is_asked_for(asked: str, method: str | None, expected: str | None) -> None:
    own = None if method is None else Quantisation(method, "{}")
    if expected is None or not expected.startswith("-"):
        assert rounded_to(asked, own, given="DIR") == expected
        return
    with pytest.raises(StartupError) as error:
        rounded_to(asked, own, given="DIR")
    assert str(error.value).startswith(expected)


MUTATIONS: dict[str, Callable[[Tensor, random.Random], Tensor | None]] = {
    "gone": lambda tensor, rng: None,
    "empty": lambda tensor, rng: tensor.view(-1)[:0],
    "flat": lambda tensor, rng: tensor.reshape(-1),
    "cut": lambda tensor, rng: tensor.reshape(-1)[: max(1, tensor.numel() // 2)],
    "doubled": lambda tensor, rng: torch.cat((tensor.reshape(-1), tensor.reshape(-1))),
    "shorter": lambda tensor, rng: tensor[: len(tensor) // 2] if tensor.dim() else tensor.view(1),
    "turned": lambda tensor, rng: tensor.T.contiguous() if tensor.dim() == 2 else tensor.view(1, -1),
    "deeper": lambda tensor, rng: tensor.unsqueeze(0),
    "wide": lambda tensor, rng: tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.int64),
    "bytes": lambda tensor, rng: tensor.contiguous().view(-1).view(torch.uint8),
    "noise": lambda tensor, rng: noise(tensor, rng),
    "ones": lambda tensor, rng: (
        tensor.contiguous().view(-1).view(torch.uint8).fill_(255).view(tensor.dtype).view(tensor.shape)
    ),
}


def noise(tensor: Tensor, rng: random.Random) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    return torch.frombuffer(bytearray(rng.randbytes(size)), dtype=tensor.dtype).view(tensor.shape)


# Tensors of pairs of four bits are bytes by another name, and torch copies none.
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("-typed")])
def test_whatever_is_wrong_is_one_line(name: str, tmp_path: Path) -> None:
    """Every tensor of a weight changed in every way: it is read, or a StartupError says why not."""
    config, writer, _ = FORMATS[name]
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    written, _ = writer(weight)
    how = quantisation_of(Fields(tmp_path / "config.json", {"quantization_config": config}))
    assert how is not None
    rng = random.Random(name)
    refused = 0
    for suffix in written:
        for change in MUTATIONS.values():
            changed = change(written[suffix].clone(), rng)
            tensors = {MODULE + key: each.clone() for key, each in written.items() if key != suffix}
            if changed is not None:
                tensors[MODULE + suffix] = changed.contiguous()
            path = tmp_path / "model.safetensors"
            save_file(tensors, path)
            try:
                found, _ = with_quantised(read_header(path), how)
                shapes = {each: (96, 64) for each in found if each == f"{MODULE}.weight"}
                with CheckpointWeights(torch.float32, torch.device("cpu"), tmp_path, found, shapes) as weights:
                    for each in shapes:
                        weights.tensor(each, (96, 64))
                        matrix = found[each].quantised
                        if matrix is not None and matrix.kind(weights._whole) is not None:
                            matrix.blocks(weights._whole, 0, 96)
            except StartupError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600
            except Mismatch:
                refused += 1
    assert refused > 5
