"""A linear layer on a GPU whose weight stays codes: integers or floats of four or eight bits with scales beside them.

Built at load time from a quantised checkpoint, called by the executor's thread. Products of few rows widen the codes in
registers (triton/coded.py), where the bytes of the weight are all the work; from `widen_from` rows on, a step's numbers
are made first and cuBLAS multiplies. Which is quicker from where is timed at start (executor/cuda_products.py).

Where the checkpoint is for inputs of float8, as its weight is, and `--packed-input-bits 8` asks for it, products of
`float8_from` rows and more round theirs: each row by a scale of its own, whatever the checkpoint says of fixed ones.
That costs two to four hundredths of a layer's result. A row's rounding does not depend on the others, but whether it is
rounded does on how many there are, those that fill up a graph among them: a prompt in one step and the same one in
small chunks, behind a cached prefix, or in other company, differ by as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import Linear
from engine.ops.mxfp4 import TABLE
from engine.ops.norm import Normed, plain
from engine.ops.triton.runtime import on_gpu

# What a code stands for, times the scale: integers of four bits from 0 on (of which 8 is taken, or `low` is added to
# the product with the scale), of eight with a sign, floats (OCP's e4m3 and e2m1), and places in a table of 16 numbers,
# which the products round to the model's dtype.
FORMS = ("int4", "int4 and low", "int8", "int8 and low", "e4m3", "e2m1", "table")
FOUR_BITS = ("int4", "int4 and low", "e2m1", "table")

# From which on a GPU converts floats of eight bits.
E4M3_CAPABILITY = (8, 9)

# Columns and warps of a program's tile of the result, and loads under way. Its rows are what TILE_ROWS says.
Tile = tuple[int, int, int]
TILES: tuple[Tile, ...] = ((32, 4, 4), (16, 2, 5), (64, 4, 4), (64, 8, 3))
TILE_ROWS = (16, 32, 64)
# Products of float8 with a scale for each row: what a weight's sizes are multiples of, and from which GPU on.
SCALED_MULTIPLE, SCALED_CAPABILITY = 16, (9, 0)
# The largest e4m3.
E4M3_MOST = 448.0
# Without a clock: from so many rows on numbers are made first.
WIDEN_FROM = 128

# Rows [start, stop) of the weight: codes uint8 [rows, K], scale float32 [rows, K / group], low the same or None.
Piece = tuple[int, int, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Codes:
    """What stands for a weight [out_features, in_features]. form: one of FORMS.

    codes uint8 [out, in], or [out, in / 2] with blocks of `width` columns in pairs, of which the second has the high
    halves. scale [in / (width n), out], low float32 the same or None: of n blocks each. table: float32 [16].
    """

    form: str
    codes: Tensor
    scale: Tensor
    low: Tensor | None
    in_features: int
    width: int
    table: Tensor | None = None

    @property
    def are_paired(self) -> bool:
        """Two of them are in a byte."""
        return self.codes.shape[1] < self.in_features

    @property
    def num_bytes(self) -> int:
        parts = (self.codes, self.scale, self.low, self.table)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def forms_kept(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Those that there are kernels for. dtype: of inputs and outputs; float32 is for comparisons."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ()
    converts = torch.cuda.get_device_capability(device) >= E4M3_CAPABILITY
    return FORMS if converts else tuple(form for form in FORMS if form != "e4m3")


def has_scaled_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are products of float8 with a scale for each row, into dtype."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= SCALED_CAPABILITY
    )


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] -> e4m3 [T, K] and scales float32 [T, 1]: the largest of a row is the largest there is. A row that is no
    numbers stays so."""
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / E4M3_MOST).clamp_min(1e-12)
    return (wide / scale).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn), scale


def tile_rows(rows: int) -> int:
    """Of a tile for a product of so many rows."""
    return next((each for each in TILE_ROWS if rows <= each), TILE_ROWS[-1])


class DeviceCodedLinear(Linear):
    """dtype: of inputs and outputs. The others: see codes_of."""

    def __init__(
        self,
        form: str,
        rows: int,
        columns: int,
        group: int,
        dtype: torch.dtype,
        device: torch.device,
        pieces: Iterable[Piece],
        bias: Tensor | None = None,
        activation: str | None = None,
        table: Sequence[float] | None = None,
    ) -> None:
        # What stands for the weight is never asked for its dtype or shape.
        super().__init__(torch.empty((1, 1), dtype=dtype), None, activation)
        self.out_features, self.in_features, self.dtype = rows, columns, dtype
        self.kind = "codes"
        self.codes = codes_of(form, rows, columns, group, device, pieces, table)
        self._bias = None if bias is None else bias.to(device)
        self.has_bias = bias is not None
        self.tiles: dict[int, Tile] = dict.fromkeys(TILE_ROWS, TILES[0])
        self.widen_from = WIDEN_FROM
        self._row_scale: Tensor | None = None
        self.float8_from: int | None = None

    @property
    def has_float8_inputs(self) -> bool:
        """Whether `by_float8` is a way."""
        return self._row_scale is not None

    def take_float8_inputs(self) -> None:
        """Inputs may be rounded to float8, where there are products of two such matrices; rows have one scale each."""
        given, even = self.codes, self.in_features % SCALED_MULTIPLE == self.out_features % SCALED_MULTIPLE == 0
        if given.form == "e4m3" and even and has_scaled_product(self.dtype, given.codes.device):
            self._row_scale = given.scale[0].float().view(1, -1)
            # Until a clock has chosen, all are: they need more memory beside them, which the start measures.
            self.float8_from = 1

    @property
    def num_bytes(self) -> int:
        """See Linear.num_bytes."""
        return self.codes.num_bytes

    @property
    def device(self) -> torch.device:
        """See Linear.device."""
        return self.codes.codes.device

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    @property
    def ways(self) -> Any:
        """See Linear.ways."""
        return self.tiles, self.widen_from, self.float8_from

    @ways.setter
    def ways(self, found: Any) -> None:
        self.tiles, self.widen_from, float8_from = found
        self.float8_from = float8_from if self.has_float8_inputs else None

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        x = plain(x)
        assert x.dtype == self.dtype and x.shape[1] == self.in_features
        if self.float8_from is not None and x.shape[0] >= self.float8_from:
            return self.by_float8(x)
        return self.by_wide(x)

    def by_wide(self, x: Tensor) -> Tensor:
        """The product with x as it is, in the way that is quicker."""
        return self.by_cublas(x) if x.shape[0] >= self.widen_from else self.by_codes(x, self.tiles[tile_rows(len(x))])

    def by_codes(self, x: Tensor, tile: Tile) -> Tensor:
        """The product, with numbers that are made in registers."""
        if x.stride(1) != 1:
            x = x.contiguous()
        if on_gpu(x):
            from engine.ops.triton import coded as kernels

            return kernels.coded_product(x, self.codes, self._bias, (tile_rows(x.shape[0]), *tile))
        wide = F.linear(x.float(), self.numbers(torch.float32), None if self._bias is None else self._bias.float())
        return wide.to(x.dtype)

    def by_cublas(self, x: Tensor) -> Tensor:
        """The product, with numbers that are made before it."""
        return F.linear(x, self.numbers(self.dtype), self._bias)

    def by_float8(self, x: Tensor) -> Tensor:
        """The product with x rounded to float8, row by row."""
        assert self._row_scale is not None
        codes, scale = rounded_rows(x)
        weight = self.codes.codes.view(torch.float8_e4m3fn).T
        y = torch._scaled_mm(codes, weight, scale_a=scale, scale_b=self._row_scale, out_dtype=self.dtype)
        return y if self._bias is None else y + self._bias

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows."""
        return self.numbers(self.dtype, ids)

    def numbers(self, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
        """The weight [out_features, in_features], or rows of it, each rounded once."""
        if on_gpu(self.codes.codes):
            from engine.ops.triton import coded as kernels

            return kernels.widened(self.codes, dtype, ids)
        return torch_numbers(self.codes, dtype, ids)


def codes_of(
    form: str,
    rows: int,
    columns: int,
    group: int,
    device: torch.device,
    pieces: Iterable[Piece],
    table: Sequence[float] | None = None,
) -> Codes:
    """Of a weight [rows, columns], which is given in pieces, from row 0 on; group: columns of a scale there, 16 or a
    multiple of 32. table: 16 numbers, of the form that has one."""
    assert form in FORMS and columns % group == 0 and (form == "table") == (table is not None)
    # Columns that are summed before a scale is taken to them.
    width = min(group, 32)
    pairs = form in FOUR_BITS and columns % (2 * width) == 0
    codes = torch.empty((rows, columns // 2 if pairs else columns), dtype=torch.uint8, device=device)
    scales = torch.empty((columns // group, rows), dtype=torch.float32, device=device)
    lows = torch.empty_like(scales) if form.endswith("low") else None
    for start, stop, own, scale, low in pieces:
        own = own.to(device)
        codes[start:stop] = _paired(own, width) if pairs else own
        scales[:, start:stop] = scale.to(device).T
        if lows is not None:
            assert low is not None
            lows[:, start:stop] = low.to(device).T
    own_table = None if table is None else torch.tensor(table, dtype=torch.float32, device=device)
    return Codes(form, codes, *_fewest(scales, lows), columns, width, own_table)


def torch_numbers(given: Codes, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """[out, in], or rows ids [T] of it: what codes stand for, each number rounded once."""
    form, codes, width = given.form, given.codes, given.width
    scale, low = given.scale.T, None if given.low is None else given.low.T
    if ids is not None:
        codes, scale, low = codes[ids], scale[ids], None if low is None else low[ids]
    if given.are_paired:
        bytes_ = codes.view(len(codes), -1, 1, width)
        codes = torch.cat((bytes_ & 15, bytes_ >> 4), 2).view(len(codes), -1)
    if form == "e4m3":
        values = codes.view(torch.float8_e4m3fn).float()
    elif form in ("e2m1", "table"):
        table = torch.tensor(TABLE, device=codes.device) if given.table is None else given.table
        values = table[codes.int()]
    elif form.startswith("int8"):
        values = codes.view(torch.int8).float()
    else:
        values = codes.float() - (8.0 if low is None else 0.0)
    values = values.view(*scale.shape, -1) * scale.float().unsqueeze(-1)
    if low is not None:
        values += low.unsqueeze(-1)
    return values.view(len(codes), -1).to(dtype)


def codes_of_mxfp4(blocks: Tensor, scales: Tensor, order: Tensor | None = None) -> Codes:
    """Of matrices below one another: uint8 blocks [matrices, rows, B, 16], neighbours in a byte, and exponents
    [matrices, rows, B]. order: of the rows of each matrix."""
    count, rows, columns = blocks.shape[0], blocks.shape[1], blocks.shape[2] * 32
    pairs = columns % 64 == 0
    codes = torch.empty((count, rows, columns // 2 if pairs else columns), dtype=torch.uint8, device=blocks.device)
    exponents = torch.empty((columns // 32, count, rows), dtype=torch.int16, device=blocks.device)
    order = (torch.arange(rows) if order is None else order).to(blocks.device)
    for number in range(count):
        some = blocks[number].index_select(0, order)
        own = torch.stack((some & 15, some >> 4), -1).view(rows, columns)
        codes[number].copy_(_paired(own, 32) if pairs else own)
        exponents[:, number].copy_(scales[number].index_select(0, order).T)
    # By its bits bfloat16 has all these powers of two, the least of them below its normal numbers; 255 is infinite.
    bits = torch.where(exponents == 0, 0x40, exponents << 7)
    scale = bits.to(torch.int16).view(torch.bfloat16).view(columns // 32, -1)
    return Codes("e2m1", codes.view(count * rows, -1), scale, None, columns, 32)


def _paired(codes: Tensor, width: int) -> Tensor:
    """uint8 [rows, K] -> [rows, K / 2]: of two blocks of `width` columns, the first low and the second high."""
    both = codes.view(len(codes), -1, 2, width)
    return (both[:, :, 0] | (both[:, :, 1] << 4)).view(len(codes), -1)


def _fewest(scales: Tensor, lows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """float32 [blocks, rows]: for fewer blocks where neighbours are the same, and scales in 16 bits where these hold
    them exactly."""
    found = [scales] if lows is None else [scales, lows]
    while found[0].shape[0] % 2 == 0:
        pairs = [each.view(-1, 2, each.shape[1]) for each in found]
        if not all(torch.equal(each[:, 0], each[:, 1]) for each in pairs):
            break
        found = [each[:, 0].contiguous() for each in pairs]
    scales = found[0]
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            scales = scales.to(dtype)
            break
    return scales, found[1] if lows is not None else None
