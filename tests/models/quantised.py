"""Writers of quantised checkpoints, by hand from what the formats' own libraries write: for the tests of reading them.

A writer turns a float32 weight into the tensors that stand for it, by the ends of their names, and into the numbers
that those mean. The rounding is the simplest one: how a library chooses scales does not matter to who reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stream(numbers: Tensor, bits: int) -> Tensor:
    """int64 [rows, n] of numbers below 2^bits -> int32 [rows, ceil(n * bits / 32)], bit by bit."""
    rows, count = numbers.shape
    every = (numbers[:, :, None] >> torch.arange(bits)) & 1
    every = torch.nn.functional.pad(every.reshape(rows, -1), (0, -count * bits % 32))
    words = (every.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def with_gaps(numbers: Tensor, bits: int) -> Tensor:
    """The same with no number in two words."""
    each = 32 // bits
    rows = len(numbers)
    parts = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % each)).view(rows, -1, each)
    words = (parts << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def rounded(weight: Tensor, bits: int, group: int, *, zero: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Codes from 0 on int64 [rows, columns], zeros int64 and scales [rows, groups], and what they mean."""
    rows, columns = weight.shape
    parts = weight.view(rows, -1, group)
    most = (1 << bits) - 1
    if zero:
        low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = ((high - low) / most).to(dtype)
        zeros = (-low / scale.float()).round().long().clamp(0, most)
    else:
        scale = (parts.abs().amax(-1) / (most / 2)).to(dtype)
        zeros = torch.full(scale.shape, 1 << (bits - 1))
    codes = ((parts / scale.float()[:, :, None]).round().long() + zeros[:, :, None]).clamp(0, most)
    meant = ((codes - zeros[:, :, None]) * scale.float()[:, :, None]).view(rows, columns)
    return codes.view(rows, columns), zeros, scale, meant


def pack_quantized(
    bits: int, group: int | None, *, zero: bool = False, gaps: bool = False, shuffled: bool = False
) -> Writer:
    """compressed-tensors. group None: a scale for a row. shuffled: groups of columns that do not lie together."""

    def write(weight: Tensor) -> Written:
        rows, columns = weight.shape
        own = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(columns)
        codes, zeros, scale, meant = rounded(weight[:, own], bits, group or columns, zero=zero)
        back = own.argsort()
        packer = with_gaps if gaps else stream
        tensors = {
            ".weight_packed": packer(codes[:, back], bits),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor([rows, columns]),
        }
        if zero:
            tensors[".weight_zero_point"] = packer(zeros.T.contiguous(), bits).T.contiguous()
        if shuffled:
            tensors[".weight_g_idx"] = (torch.arange(columns) // (group or columns))[back].int()
        return tensors, meant[:, back]

    return write


def int_quantized(bits: int, group: int | None) -> Writer:
    """compressed-tensors, a byte for each number."""

    def write(weight: Tensor) -> Written:
        codes, zeros, scale, meant = rounded(weight, bits, group or weight.shape[1], zero=False)
        tensors = {".weight": (codes - zeros[:1, :1]).to(torch.int8), ".weight_scale": scale}
        return {**tensors, ".input_scale": torch.ones(1)}, meant

    return write


def float8(
    block: tuple[int, int] | None, name: str = ".weight_scale", *, shape: Any = None, exponents: bool = False
) -> Writer:
    """e4m3; block: rows and columns, 0 for all of them. shape: in which scales are stored."""

    def write(weight: Tensor) -> Written:
        rows, columns = weight.shape
        high, wide = block or (rows, columns)
        high, wide = high or rows, wide or columns
        grid = -(-rows // high), -(-columns // wide)
        padded = torch.nn.functional.pad(weight, (0, grid[1] * wide - columns, 0, grid[0] * high - rows))
        scale = padded.view(grid[0], high, grid[1], wide).abs().amax((1, 3)) / 448
        stored = scale
        if exponents:
            stored = (scale.log2().ceil() + 127).to(torch.uint8)
            scale = torch.exp2(stored.float() - 127)
        spread = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {".weight": codes, name: stored.reshape(shape(grid) if shape else grid)}, codes.float() * spread

    return write


def nearest(weight: Tensor) -> Tensor:
    """Codes of e2m1, int64."""
    return (weight[..., None] - E2M1).abs().argmin(-1)


def pairs(codes: Tensor) -> Tensor:
    """[rows, n] of four bits -> uint8 [rows, n / 2], the first of two low."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


def nvfp4(*, divides: bool) -> Writer:
    """compressed-tensors, which divides by the global scale, or modelopt."""

    def write(weight: Tensor) -> Written:
        rows = len(weight)
        parts = weight.view(rows, -1, 16)
        factor = parts.abs().max() / 2688
        if divides:
            factor = 1 / (1 / factor)
        scale = (parts.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
        each = (scale.float() * factor)[:, :, None]
        codes = nearest(parts / each)
        meant = (E2M1[codes] * each).view(weight.shape)
        packed = pairs(codes.view(weight.shape))
        if divides:
            return {
                ".weight_packed": packed,
                ".weight_scale": scale,
                ".weight_global_scale": (1 / factor).view(1),
            }, meant
        return {".weight": packed, ".weight_scale": scale, ".weight_scale_2": factor, ".input_scale": factor + 1}, meant

    return write


def as_float4(writer: Writer, suffix: str) -> Writer:
    """The same, with the pairs called what they are: F4 in the file, which counts the numbers."""

    def write(weight: Tensor) -> Written:
        tensors, meant = writer(weight)
        return tensors | {suffix: tensors[suffix].view(torch.float4_e2m1fn_x2)}, meant

    return write


def mxfp4(weight: Tensor) -> Written:
    """compressed-tensors."""
    parts = weight.view(len(weight), -1, 32)
    exponents = (parts.abs().amax(-1) / 6).log2().ceil()
    codes = nearest(parts / exponents.exp2()[:, :, None])
    meant = (E2M1[codes] * exponents.exp2()[:, :, None]).view(weight.shape)
    return {
        ".weight_packed": pairs(codes.view(weight.shape)),
        ".weight_scale": (exponents + 127).to(torch.uint8),
    }, meant


def gptq(
    bits: int, group: int, *, offset: int = 1, shuffled: bool = False, zero: bool = False, negative: bool = False
) -> Writer:
    """offset: what a stored zero lacks. shuffled: desc_act. negative: some scales are."""

    def write(weight: Tensor) -> Written:
        columns = weight.shape[1]
        own = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(columns)
        codes, zeros, scale, meant = rounded(weight[:, own], bits, group, zero=zero, dtype=torch.float16)
        zeros = zeros.clamp_min(offset)
        if negative:
            scale = torch.where(torch.arange(scale.numel()).view(scale.shape) % 2 == 0, -scale, scale)
        spread = torch.arange(columns) // group
        meant = (codes - zeros[:, spread]) * scale.float()[:, spread]
        back = own.argsort()
        tensors = {
            ".qweight": stream(codes[:, back], bits).T.contiguous(),
            ".qzeros": stream((zeros - offset).T.contiguous(), bits),
            ".scales": scale.T.contiguous(),
            ".g_idx": spread[back].int(),
        }
        return tensors, meant[:, back]

    return write


def without(writer: Writer, suffix: str) -> Writer:
    """The same without one of the tensors."""

    def write(weight: Tensor) -> Written:
        tensors, meant = writer(weight)
        return {name: tensor for name, tensor in tensors.items() if name != suffix}, meant

    return write


def awq(weight: Tensor) -> Written:
    codes, zeros, scale, meant = rounded(weight, 4, 32, zero=True, dtype=torch.float16)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: Tensor) -> Tensor:
        return stream(numbers.T.reshape(numbers.shape[1], -1, 8)[:, :, order].reshape(numbers.shape[1], -1), 4)

    return {".qweight": packed(codes), ".qzeros": packed(zeros), ".scales": scale.T.contiguous()}, meant


def modelopt_int4(weight: Tensor) -> Written:
    """Rows in pairs, and inputs that are multiplied by numbers of their own first."""
    before = torch.linspace(0.5, 2, weight.shape[1]).bfloat16()
    codes, zeros, scale, meant = rounded(weight / before.float(), 4, 32, zero=False, dtype=torch.float32)
    nibbles = (codes - zeros[:1, :1]) & 15
    packed = (nibbles[::2] | (nibbles[1::2] << 4)).to(torch.uint8)
    tensors = {".weight": packed, ".weight_scale": scale, ".pre_quant_scale": before}
    return {**tensors, ".weight_scale_2": torch.tensor(0.25), ".input_scale": torch.tensor(1.0)}, meant * before.float()


def bnb_int8(weight: Tensor) -> Written:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": torch.zeros((), dtype=torch.uint8)}
    return tensors, codes.float() * largest[:, None] / 127


def bnb_nf4(*, nested: bool) -> Writer:
    table = torch.linspace(-1, 1, 16)  # whatever is stored counts

    def write(weight: Tensor) -> Written:
        parts = weight.view(-1, 64)
        largest = parts.abs().amax(1)
        tensors = {}
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        if nested:
            nested_table = torch.linspace(-1, 1, 256)
            offset = float(largest.mean())
            outer = torch.stack([part.abs().max() for part in (largest - offset).split(256)])
            each = outer.repeat_interleave(256)[: len(largest)]
            places = ((largest - offset)[:, None] / each[:, None] - nested_table).abs().argmin(1)
            largest = nested_table[places] * each + offset
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            tensors = {".weight.nested_absmax": outer, ".weight.nested_quant_map": nested_table}
            tensors[".weight.absmax"] = places.to(torch.uint8)
        else:
            tensors[".weight.absmax"] = largest
        codes = (parts[:, :, None] / largest[:, None, None] - table).abs().argmin(-1)
        meant = (table[codes] * largest[:, None]).view(weight.shape)
        flat = codes.view(-1)
        tensors[".weight"] = ((flat[::2] << 4) | flat[1::2]).to(torch.uint8)[:, None]
        tensors[".weight.quant_map"] = table.clone()
        told = json.dumps(state).encode()
        tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        return tensors, meant

    return write


def torchao(group: int | None) -> Writer:
    def write(weight: Tensor) -> Written:
        codes, zeros, scale, meant = rounded(
            weight, 8, group or weight.shape[1], zero=group is not None, dtype=torch.float32
        )
        middle = codes - 128
        tensors = {"._weight_qdata": middle.to(torch.int8), "._weight_scale": scale}
        if group is not None:
            tensors["._weight_zero_point"] = (zeros - 128).to(torch.int8)
        else:
            tensors["._weight_scale"] = scale.view(-1)
        return tensors, meant

    return write


def hqq(bits: int, group: int, *, axis: int = 1) -> Writer:
    """Groups of the flat weight, whose zeros are no integers."""

    def write(weight: Tensor) -> Written:
        flat = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1)
        low, high = flat.amin(axis, keepdim=True), flat.amax(axis, keepdim=True)
        scale = ((high - low) / ((1 << bits) - 1)).half()
        zero = (-low / scale.float()).half()
        codes = (flat / scale.float() + zero.float()).round().clamp(0, (1 << bits) - 1)
        meant = ((codes - zero.float()) * scale.float()).view(weight.shape)
        each = 10 if bits == 3 else 8 // bits
        padded = torch.nn.functional.pad(codes.long(), (0, 0, 0, -len(codes) % each))
        parts = padded.view(each, -1, codes.shape[1])
        packed = (parts << ((each - 1 - torch.arange(each)) * bits)[:, None, None]).sum(0)
        tensors = {
            ".W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
            ".scale": scale,
            ".zero": zero,
            ".shape": torch.tensor(weight.shape),
            ".nbits": torch.tensor([bits]),
            ".axis": torch.tensor([axis]),
        }
        return tensors, meant

    return write
