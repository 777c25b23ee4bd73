"""Checkpoints whose matrices are float8 (e4m3) with a scale for every block, as DeepSeek V3 introduced them.

A matrix `NAME.weight` [out, in] stands beside `NAME.weight_scale_inv`, which it is multiplied by, despite that name:
[ceil(out / rows), ceil(in / columns)], or one number. They are dequantised while they are read, in float32, and rounded
once to the model's dtype. Whatever else a file has in floats is read as it is. Used at start, on the loading thread.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.loading.checkpoint import StoredTensor
from engine.models.spec import Float8

_WEIGHT, _SCALE = ".weight", ".weight_scale_inv"
# Of activations that are quantised by a fixed scale; here they never are.
_UNUSED = (".activation_scale", ".input_scale")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


def with_scales(tensors: dict[str, StoredTensor], kind: Float8) -> dict[str, StoredTensor]:
    """The same with every scale as part of its matrix. Raises StartupError."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_SCALE, *_UNUSED))}
    for name, scale in tensors.items():
        if not name.endswith(_SCALE):
            continue
        owner = name.removesuffix(_SCALE) + _WEIGHT
        weight = tensors.get(owner)
        if weight is None:
            raise StartupError(f"{scale.file}: tensor {name} is the scale of {owner}, which is missing")
        if weight.dtype != "F8_E4M3" or scale.dtype not in SCALE_DTYPES:
            raise StartupError(
                f"{scale.file}: tensors {owner} and {name} have dtypes {weight.dtype} and {scale.dtype}; "
                f"F8_E4M3 and one of {', '.join(SCALE_DTYPES)} are read"
            )
        expected = block_counts(weight.shape, kind)
        if scale.shape not in (expected, (), (1,)):
            raise StartupError(
                f"{scale.file}: tensor {name} has shape {list(scale.shape)}; weight_block_size in config.json asks for "
                f"{list(expected)}"
            )
        found[owner] = dataclasses.replace(weight, scale=scale, block=kind.block)
    return found


def block_counts(shape: tuple[int, ...], kind: Float8) -> tuple[int, ...]:
    """Rows and columns of a matrix's scales."""
    if kind.block is None or len(shape) != 2:
        return ()
    return -(-shape[0] // kind.block[0]), -(-shape[1] // kind.block[1])


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """codes float8 [rows, columns], from the first row of a block on; scales float32 [blocks, column blocks], or one.

    float32 [rows, columns].
    """
    values = codes.to(torch.float32)
    if scales.numel() == 1:
        return values.mul_(scales.view(()))
    assert block is not None
    columns = values.shape[1]
    by_column = scales.repeat_interleave(min(block[1], columns), 1)[:, :columns]
    for number, row in enumerate(by_column):
        values[number * block[0] : (number + 1) * block[0]].mul_(row)
    return values
