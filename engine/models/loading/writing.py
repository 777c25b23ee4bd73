"""Writes a model's checkpoint again with the weights of its layers rounded, in the format compressed-tensors.

Called by engine/quantise.py. One tensor is in memory at a time; everything that is not a layer's weight is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.fields import Fields
from engine.models.loading.checkpoint import INDEX, MappedFiles, StoredTensor, find_tensors, read_metadata
from engine.models.loading.finding import find_model_tensors
from engine.models.loading.schemes.base import FLOATS, Mismatch
from engine.models.loading.schemes.rounding import rounded, rounded_float8
from engine.models.loading.weights import OUTPUT, TORCH_DTYPES, ShapeRecorder, view_of
from engine.models.parts.streams import make_decoder
from engine.models.registry import read_spec
from engine.ops.linear import Linear

# The version of compressed-tensors whose format this is.
VERSION = "0.19.0"
# Bits of a scheme; fp8 has a scale for each row, the others for each group.
SCHEMES = {"int4": 4, "int8": 8, "fp8": 8}
GROUPS = (128, 64, 32)
# Rows of a layer that are as few are a gate's, which decides too much to be rounded.
FEW_ROWS = 16
# Of files beside the weights, those that are copied.
MOST_COPIED = 256 * 1024 * 1024
PIECE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """rounded, kept: how many matrices. before, after: bytes of all tensors."""

    rounded: int
    kept: int
    before: int
    after: int


class _LayerNames(ShapeRecorder):
    """The weights that a model asks for as those of layers, without its routers'."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.names: set[str] = set()

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        order: Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """See Weights.linear."""
        for name, count in zip(names, rows, strict=True):
            gate = dtype is not None or name.rpartition(".")[2] in ("gate", "router") or count <= FEW_ROWS
            if not gate and name != OUTPUT:
                self.names.add(f"{name}.weight")
        return super().linear(names, rows, columns, bias=bias, order=order, activation=activation, dtype=dtype)


def write_quantised(source: Path, to: Path, scheme: str, group_size: int | None = None) -> Written:
    """scheme: one of SCHEMES. group_size: columns of a scale; None: the largest of GROUPS that divides a layer's.

    Raises StartupError.
    """
    spec = read_spec(source)
    if not source.is_dir() or spec.quantisation is not None:
        raise StartupError(f"{source}: only a directory of safetensors that is not quantised can be rounded")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StartupError(f"{to}: is there already")
    recorder = _LayerNames(torch.float32)
    make_decoder(spec, recorder, spec.context_length)
    ours = find_model_tensors(source, spec)
    asked = {(ours[name].file, ours[name].begin) for name in recorder.names if name in ours}
    tensors = find_tensors(source)
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        matrix = name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS
        if matrix and (tensor.file, tensor.begin) in asked:
            size = tensor.shape[1] if scheme == "fp8" else _group_of(tensor.shape[1], group_size)
            if size is not None:
                sizes[name] = size
    if not sizes:
        raise StartupError(f"{source}: holds no layer that groups of {group_size or GROUPS[-1]} divide")
    kept = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in sizes and "norm" not in name
    ]
    to.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    after = 0
    mapped = MappedFiles()
    try:
        for file in sorted({tensor.file for tensor in tensors.values()}):
            own = {name: tensor for name, tensor in tensors.items() if tensor.file == file}
            plan = [entry for name, tensor in own.items() for entry in _entries(name, tensor, sizes.get(name), scheme)]
            after += _write(to / file.name, plan, own, sizes, scheme, mapped, read_metadata(file))
            files |= dict.fromkeys((name for name, _, _ in plan), file.name)
    finally:
        mapped.close()
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": after}, "weight_map": files}
        (to / INDEX).write_text(json.dumps(index, indent=2))
    config = Fields.read(source / "config.json").as_json()
    described = {**json.loads(config), "quantization_config": _config(scheme, sizes, kept)}
    (to / "config.json").write_text(json.dumps(described, indent=2))
    for path in source.iterdir():
        weights = path.name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", INDEX))
        if path.is_file() and path.name != "config.json" and not weights and path.stat().st_size <= MOST_COPIED:
            shutil.copyfile(path, to / path.name)
    before = sum(tensor.end - tensor.begin for tensor in tensors.values())
    return Written(len(sizes), len(kept), before, after)


def _group_of(columns: int, asked: int | None) -> int | None:
    """None where no group divides them."""
    return next((size for size in ((asked,) if asked else GROUPS) if columns % size == 0), None)


def _config(scheme: str, sizes: dict[str, int], kept: Sequence[str]) -> dict[str, Any]:
    """What config.json says of it. Layers of the commonest size of groups are named by their class."""
    common = max(set(sizes.values()), key=list(sizes.values()).count)
    groups = {}
    for number, size in enumerate(
        sorted(set(sizes.values()), key=lambda each: each != common) if scheme != "fp8" else [0]
    ):
        weights: dict[str, Any] = {
            "num_bits": SCHEMES[scheme],
            "type": "float" if scheme == "fp8" else "int",
            "symmetric": True,
            "strategy": "channel" if scheme == "fp8" else "group",
            "group_size": None if scheme == "fp8" else size,
            "dynamic": False,
        }
        names = [name.removesuffix(".weight") for name, own in sizes.items() if own == size]
        targets = ["Linear"] if number == 0 else names
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "float-quantized" if scheme == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys([*kept, OUTPUT])),
        "kv_cache_scheme": None,
    }


Entry = tuple[str, str, tuple[int, ...]]


def _entries(name: str, tensor: StoredTensor, size: int | None, scheme: str) -> list[Entry]:
    """Name, dtype and shape of what stands for a tensor."""
    if size is None:
        return [(name, tensor.dtype, tensor.shape)]
    rows, columns = tensor.shape
    scale = (f"{name}_scale", "BF16", (rows, columns // size))
    if scheme == "fp8":
        return [(name, "F8_E4M3", (rows, columns)), scale]
    words = columns * SCHEMES[scheme] // 32
    return [(f"{name}_packed", "I32", (rows, words)), scale, (f"{name}_shape", "I64", (2,))]


def _write(
    path: Path,
    plan: Sequence[Entry],
    tensors: dict[str, StoredTensor],
    sizes: dict[str, int],
    scheme: str,
    mapped: MappedFiles,
    metadata: dict[str, str],
) -> int:
    """One file; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    at = 0
    for name, dtype, shape in plan:
        size = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if name in sizes:
                for part in _rounded(name, tensor, sizes[name], scheme, mapped):
                    file.write(part.contiguous().view(torch.uint8).numpy().tobytes())
            else:
                data = mapped.get(tensor.file, tensor.end)
                for begin in range(tensor.begin, tensor.end, PIECE):
                    file.write(data[begin : min(begin + PIECE, tensor.end)])
            if tensor.end > tensor.begin:
                mapped.release(tensor.file, tensor.begin, tensor.end)
    return at


def _rounded(name: str, tensor: StoredTensor, size: int, scheme: str, mapped: MappedFiles) -> Iterator[Tensor]:
    """The tensors of `_entries`, in their order."""
    rows, columns = tensor.shape
    whole = view_of(mapped, tensor, TORCH_DTYPES[tensor.dtype], 0, rows * columns).view(rows, columns)
    step = max(1, PIECE // columns)
    codes, scales = [], []
    for begin in range(0, rows, step):
        part = whole[begin : begin + step].float()
        try:
            if scheme == "fp8":
                found, scale = rounded_float8(part)
                codes.append(found)
            else:
                found, scale = rounded(part.reshape(-1, size), SCHEMES[scheme], torch.bfloat16, signs=False)
                codes.append(_packed(found.view(len(part), columns), SCHEMES[scheme]))
        except Mismatch as problem:
            raise StartupError(f"{tensor.file}: tensor {name}: {problem}") from None
        scales.append(scale.view(len(part), -1).bfloat16())
    yield torch.cat(codes)
    yield torch.cat(scales)
    if scheme != "fp8":
        yield torch.tensor([rows, columns])


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, columns] -> int32 [rows, words], counted from the bottom of the range, the first one lowest."""
    numbers = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        numbers = numbers[:, ::2] | (numbers[:, 1::2] << 4)
    return numbers.contiguous().view(torch.int32)
